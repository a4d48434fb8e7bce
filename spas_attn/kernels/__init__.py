"""Triton kernels and their launchers; importing this package does not import Triton, importing its modules does."""
