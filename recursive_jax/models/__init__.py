"""What the network is: pure functions of params; no files, no flags, no mesh."""
