"""The kernels for TPUs, by Pallas' Mosaic backend."""
