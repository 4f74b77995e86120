"""Loader adapters: how windows reach the filter from each kind of data and loader."""
