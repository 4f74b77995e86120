"""Streaming data filter for pretraining loaders, learned from metagradients."""
