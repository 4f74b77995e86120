"""Comparisons with other implementations of the same quantity; each needs an extra package."""
