"""2:4 sparse linear layers: formats, a reference, CPU and GPU kernels, and the ops that carry them through graphs."""
