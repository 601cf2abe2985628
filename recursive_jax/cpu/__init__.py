"""The network for one CPU: kernels, parameter layout, layer loop."""
