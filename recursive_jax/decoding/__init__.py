"""Many requests, one block: generation."""
