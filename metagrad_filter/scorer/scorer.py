"""The distilled model of the text lane: one cheap forward pass per window, numpy only.

    score = bias + mean over n-grams of linear[row]
          [ + relu(mean over n-grams of embedding[row] @ hidden_kernel + hidden_bias) @ output ]

A higher score means that training on the window lowers the outer metric more. Everything after
the table reads is float64 arithmetic without BLAS, so a window's score does not depend on the
batch it arrives in. The linear scorer's cost per window is in the demo's record.

Read next: `features.py` (the n-grams), `artifact.py` (how a scorer is stored), `fit.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.scorer import ngram_mean  # pyright: ignore[reportMissingImports]
from metagrad_filter.scorer import features

_DEEP = ("embedding", "hidden_kernel", "hidden_bias", "output_kernel")
_SAME: Any = object()


@dataclass(frozen=True, eq=False, slots=True)
class Scorer:
    """A fitted text scorer.

    Attributes:
      vocab_size: token ids lie in `[0, vocab_size)`.
      bits: `linear` has `2**bits` rows.
      hash_seed: uint32 seed of the n-gram hash.
      linear: `(2**bits,)` float32, the weight of each hashed n-gram.
      bias: added to every score.
      pad_id: n-grams that hold this id are absent; None when every id counts.
      embedding: `(2**embedding_bits, D)` float32, or None for a linear scorer.
      hidden_kernel: `(D, H)` float32, present with `embedding`.
      hidden_bias: `(H,)` float32, present with `embedding`.
      output_kernel: `(H,)` float32, present with `embedding`.
      strength: how strongly the filter may act: `inf` keeps the k best, 0 a uniform k, anything
        between draws with logits `strength * gaussian rank score` (Gumbel top-k).
      metadata: JSON types only; where the scorer came from.
      kind: always "text".
    """

    vocab_size: int
    bits: int
    hash_seed: int
    linear: np.ndarray
    bias: float = 0.0
    pad_id: int | None = None
    embedding: np.ndarray | None = None
    hidden_kernel: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    output_kernel: np.ndarray | None = None
    strength: float = math.inf
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: str = "text"

    def __post_init__(self):
        if self.kind != "text":
            raise ConfigError(f"kind is {self.kind!r}, expected 'text' for a text scorer.")
        features.check_bits(self.bits)
        _check_int("vocab_size", self.vocab_size, 1, 2**31 - 1)
        _check_int("hash_seed", self.hash_seed, 0, 2**32 - 1)
        if self.pad_id is not None:
            _check_int("pad_id", self.pad_id, -(2**31), 2**31 - 1)
        _check_number("bias", self.bias, finite=True)
        _check_number("strength", self.strength, finite=False)
        if not self.strength >= 0:
            raise ConfigError(f"strength is {self.strength!r}, expected 0 <= strength <= inf.")
        if not isinstance(self.metadata, dict):
            raise ConfigError(f"metadata is {self.metadata!r}, expected a dict of JSON types.")
        for name, expected in self._shapes().items():
            _check_tensor(name, getattr(self, name), expected)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"linear": (1 << self.bits,)}
        given = [name for name in _DEEP if getattr(self, name) is not None]
        if not given:
            return shapes
        if len(given) != len(_DEEP):
            missing = sorted(set(_DEEP) - set(given))
            raise ConfigError(f"The deeper part lacks {missing}; give all of {list(_DEEP)}.")
        embedding, kernel = np.asarray(self.embedding), np.asarray(self.hidden_kernel)
        if embedding.ndim != 2 or kernel.ndim != 2 or 0 in embedding.shape or 0 in kernel.shape:
            raise ConfigError(
                f"embedding has shape {embedding.shape} and hidden_kernel {kernel.shape}, "
                "expected (2**embedding_bits, D) and (D, H), both non-empty."
            )
        bits = embedding.shape[0].bit_length() - 1
        features.check_bits(bits)
        width, hidden = embedding.shape[1], kernel.shape[1]
        return shapes | {
            "embedding": (1 << bits, width),
            "hidden_kernel": (width, hidden),
            "hidden_bias": (hidden,),
            "output_kernel": (hidden,),
        }

    @property
    def embedding_bits(self) -> int | None:
        """log2 of the number of embedding rows; None for a linear scorer."""
        return None if self.embedding is None else self.embedding.shape[0].bit_length() - 1

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this scorer by field name."""
        return {name: getattr(self, name) for name in self._shapes()}

    def score(self, windows: np.ndarray, *, pad_id: int | None = _SAME) -> np.ndarray:
        """Scores windows; higher is better.

        Args:
          windows: `(N, T)` integer token ids, N >= 0, T >= 1.
          pad_id: replaces the scorer's own padding id for this call.

        Returns:
          `(N,)` float32. Raises `WindowError` for ids outside `[0, vocab_size)`.

        Example:
          >>> scorer = Scorer(10, 4, 0, np.ones(16, np.float32), bias=0.5)
          >>> scorer.score(np.array([[1, 2, 3]], np.int32))
          array([1.5], dtype=float32)
        """
        pad = self.pad_id if pad_id is _SAME else pad_id
        total = self._mean(self.linear[:, None], self.bits, windows, pad)[:, 0] + self.bias
        if (
            self.embedding is not None
            and self.hidden_kernel is not None
            and self.hidden_bias is not None
            and self.output_kernel is not None
        ):
            bag = self._mean(self.embedding, self.embedding_bits or 0, windows, pad)
            kernel = self.hidden_kernel.astype(np.float64)
            hidden = np.tile(self.hidden_bias.astype(np.float64), (len(bag), 1))
            # Explicit sums: a BLAS product rounds differently for different batch sizes, and
            # then a block would be ranked differently by different worker counts.
            for d in range(kernel.shape[0]):
                hidden += bag[:, d, None] * kernel[d]
            np.maximum(hidden, 0.0, out=hidden)
            for h in range(kernel.shape[1]):
                total += hidden[:, h] * float(self.output_kernel[h])
        with np.errstate(over="ignore"):
            return total.astype(np.float32)

    def _mean(self, table: np.ndarray, bits: int, windows, pad: int | None) -> np.ndarray:
        return ngram_mean(
            table,
            windows,
            bits=bits,
            hash_seed=self.hash_seed,
            vocab_size=self.vocab_size,
            pad_id=pad,
        )


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, expected an int in [{low}, {high}].")


def _check_number(name: str, value: Any, *, finite: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ConfigError(f"{name} is {value!r}, expected a number.")
    if finite and math.isinf(value):
        raise ConfigError(f"{name} is {value!r}, expected a finite number.")


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
        seen = (
            f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        raise ConfigError(f"{name} is {seen}, expected a float32 array of shape {shape}.")
    if not np.isfinite(value).all():
        raise ConfigError(f"{name} holds NaN or inf; fit again, or inspect the labels.")
