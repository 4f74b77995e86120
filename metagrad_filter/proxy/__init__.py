"""Proxy models: what the calibrator trains and differentiates in the live model's stead."""

from metagrad_filter.proxy.decoder import DecoderConfig, DecoderLoss, init_decoder
from metagrad_filter.proxy.proxy import Proxy

__all__ = ["DecoderConfig", "DecoderLoss", "Proxy", "init_decoder"]
