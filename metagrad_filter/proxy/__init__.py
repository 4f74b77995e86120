"""Proxy models: what the calibrator trains and differentiates in the live model's stead."""

from metagrad_filter.proxy.decoder import DecoderConfig
from metagrad_filter.proxy.forecast import Quantiles, StudentT
from metagrad_filter.proxy.jepa import EmaOptimizer, JepaConfig, JepaLoss, init_jepa
from metagrad_filter.proxy.llama import LlamaConfig, RopeScaling
from metagrad_filter.proxy.loss import DecoderLoss, init_decoder
from metagrad_filter.proxy.pretrained import Pretrained, load_pretrained, save_pretrained
from metagrad_filter.proxy.proxy import Proxy
from metagrad_filter.proxy.series import SeriesConfig, SeriesLoss, init_series

__all__ = [
    "DecoderConfig",
    "DecoderLoss",
    "EmaOptimizer",
    "JepaConfig",
    "JepaLoss",
    "LlamaConfig",
    "Pretrained",
    "Proxy",
    "Quantiles",
    "RopeScaling",
    "SeriesConfig",
    "SeriesLoss",
    "StudentT",
    "init_decoder",
    "init_jepa",
    "init_series",
    "load_pretrained",
    "save_pretrained",
]
