"""Kernels and the registry that chooses between them."""
