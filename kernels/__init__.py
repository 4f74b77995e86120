"""Compiled and hand-written kernels; importable without jax."""
