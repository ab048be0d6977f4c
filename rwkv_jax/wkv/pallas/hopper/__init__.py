"""Kernels for Hopper GPUs, by Pallas' Mosaic GPU backend."""
