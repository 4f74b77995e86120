"""Benchmarks: scripts that measure, and the JSON records they write."""
