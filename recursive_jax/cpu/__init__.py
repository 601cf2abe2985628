"""The network for one CPU: kernels and their build, parameter layout, cache, layer loop."""
