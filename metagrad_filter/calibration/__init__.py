"""Calibration: rounds that turn metagradients into published scorer versions."""
