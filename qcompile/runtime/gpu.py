"""Quantized products on GPUs, from generated Triton kernels."""
