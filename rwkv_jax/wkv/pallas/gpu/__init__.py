"""The kernels for NVIDIA GPUs, by Pallas' Triton backend."""
