"""2:4 products on NVIDIA GPUs.  Importing this package loads neither Triton nor CUDA: `api` does so
at the first launch.
"""
