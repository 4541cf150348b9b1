"""Layers of plain PyTorch with faster kernels for CPUs. Nothing here runs on a GPU."""
