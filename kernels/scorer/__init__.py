"""Compiled hot-lane scoring kernels."""
