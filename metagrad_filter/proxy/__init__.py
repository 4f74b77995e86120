"""Proxy models: what the calibrator trains and differentiates in the live model's stead."""

from metagrad_filter.proxy.decoder import DecoderConfig
from metagrad_filter.proxy.llama import LlamaConfig, RopeScaling
from metagrad_filter.proxy.loss import DecoderLoss, init_decoder
from metagrad_filter.proxy.pretrained import Pretrained, load_pretrained, save_pretrained
from metagrad_filter.proxy.proxy import Proxy

__all__ = [
    "DecoderConfig",
    "DecoderLoss",
    "LlamaConfig",
    "Pretrained",
    "Proxy",
    "RopeScaling",
    "init_decoder",
    "load_pretrained",
    "save_pretrained",
]
