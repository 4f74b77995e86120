"""Small scorers and sources that the hot lane's tests share; importable in worker processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from metagrad_filter.scorer.scorer import Scorer

VOCAB = 100


def make_scorer(seed: int = 0, *, bits: int = 6, deep: bool = False, **fields: Any) -> Scorer:
    """Returns a random scorer, different for every seed; `deep` has a hidden part."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    width = 24 if deep else 1
    fields = {"table": normal(1 << bits, width)} | fields
    if deep:
        fields = {
            "skip": normal(width),
            "hidden_kernel": normal(width, 40),
            "hidden_bias": normal(40),
            "output_kernel": normal(40),
        } | fields
    fields = {"strength": math.inf, "bias": 0.25, "metadata": {"seed": seed}} | fields
    return Scorer(VOCAB, seed, **fields)


def make_windows(n: int, length: int = 16, seed: int = 0) -> np.ndarray:
    """Returns `(n, length)` int32 ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, (n, length)).astype(np.int32)


def make_elements(n: int, length: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Returns dict elements with `tokens` and their `index`."""
    return [{"tokens": w, "index": i} for i, w in enumerate(make_windows(n, length, seed))]
