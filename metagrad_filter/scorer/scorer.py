"""The distilled model of the text lane: one cheap forward pass per window, without jax.

    mean  = scale * (sum over n-grams of table[row]) / (number of present n-grams)
    score = bias + skip @ mean [ + relu(mean @ hidden_kernel + hidden_bias) @ output_kernel ]

A higher score means that training on the window lowers the outer metric more. One table serves the
linear part and the hidden part, so that each n-gram costs one read: column 0 holds the weights of
the linear scorer, the others what the hidden part needs. A window's score is the same bits whatever
the batch it arrives in, the number of threads, the instruction set, native code or numpy.

Read next: `features.py` (the n-grams), `artifact.py` (how a scorer is stored), `fit.py`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.scorer import NgramKernel  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.scorer.ngram_reference import NgramModel  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.scorer.quantization import quantize_columns  # pyright: ignore[reportMissingImports]
from metagrad_filter.scorer import features

DTYPES = ("int8", "float16", "float32")
GOLDEN_WINDOWS, GOLDEN_LENGTH = 8, 32

_HIDDEN = ("hidden_kernel", "hidden_bias", "output_kernel")
_TENSORS = ("table", "scale", "skip")
_FIELDS = ("vocab_size", "hash_seed", "orders", "pad_id", "bias")
_SAME: Any = object()


@dataclass(frozen=True, eq=False)
class Scorer:
    """A fitted text scorer; its arrays are read-only from then on.

    Attributes:
      vocab_size: token ids lie in `[0, vocab_size)`.
      hash_seed: uint32 seed of the n-gram hash.
      table: `(2**bits, D)` int8, float16 or float32, a row for each hashed n-gram.
      orders: 1 unigrams, 2 bigrams as well, 3 trigrams as well.
      scale: `(D,)` float32 factor of each column; ones unless the table is int8.
      skip: `(D,)` float32 weight of each mean in the score; the first column alone by default.
      hidden_kernel: `(D, H)` float32, or None for a linear scorer.
      hidden_bias: `(H,)` float32, present with `hidden_kernel`.
      output_kernel: `(H,)` float32, present with `hidden_kernel`.
      bias: added to every score.
      pad_id: n-grams that hold this id are absent; None when every id counts.
      strength: how strongly the filter may act: `inf` keeps the k best, 0 a uniform k, anything
        between draws with logits `strength * gaussian rank score` (Gumbel top-k).
      metadata: JSON types only; where the scorer came from.
      kind: "text".
    """

    kind: ClassVar[str] = "text"

    vocab_size: int
    hash_seed: int
    table: np.ndarray
    _: dataclasses.KW_ONLY
    orders: int = 2
    scale: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    skip: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    hidden_kernel: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    output_kernel: np.ndarray | None = None
    bias: float = 0.0
    pad_id: int | None = None
    strength: float = math.inf
    metadata: dict[str, Any] = field(default_factory=dict)
    _kernel: Any = field(default=None, init=False, repr=False)

    def __post_init__(self):
        _check_int("vocab_size", self.vocab_size, 1, 2**31 - 1)
        _check_int("hash_seed", self.hash_seed, 0, 2**32 - 1)
        features.check_orders(self.orders)
        if self.pad_id is not None:
            _check_int("pad_id", self.pad_id, -(2**31), 2**31 - 1)
        _check_number("bias", self.bias, finite=True)
        check_common(self.strength, self.metadata)
        width = self._check_table()
        for name, default in (("scale", np.ones), ("skip", _first)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default(width, np.float32))
        shapes = {"scale": (width,), "skip": (width,)} | self._hidden_shapes(width)
        for name, expected in shapes.items():
            _check_tensor(name, getattr(self, name), expected)
        if self.table.dtype != np.int8 and (self.scale != 1).any():
            raise ConfigError(
                f"scale is given with a {self.table.dtype} table, expected ones; multiply the "
                "table's columns by it."
            )
        for name, tensor in self.tensors().items():
            # A view, for the caller's own array stays writable to the caller.
            view = np.ascontiguousarray(tensor).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        object.__setattr__(self, "_kernel", NgramKernel(self._model()))

    def _check_table(self) -> int:
        table = self.table
        if not isinstance(table, np.ndarray) or str(table.dtype) not in DTYPES or table.ndim != 2:
            raise ConfigError(
                f"table is {_seen(table)}, expected a (2**bits, D) array of {', '.join(DTYPES)}."
            )
        rows, width = table.shape
        if not 1 <= self.bits <= features.MAX_BITS or rows != 1 << self.bits or width < 1:
            raise ConfigError(
                f"table has shape {table.shape}, expected (2**bits, D) with bits in "
                f"[1, {features.MAX_BITS}] and D >= 1."
            )
        _check_finite("table", table)
        return width

    def _hidden_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        given = [name for name in _HIDDEN if getattr(self, name) is not None]
        if not given:
            return {}
        if len(given) != len(_HIDDEN):
            missing = sorted(set(_HIDDEN) - set(given))
            raise ConfigError(f"The hidden part lacks {missing}; give all of {list(_HIDDEN)}.")
        units = np.asarray(self.hidden_bias).size
        if units < 1:
            raise ConfigError("hidden_bias is empty, expected at least one hidden unit.")
        return {"hidden_kernel": (width, units), "hidden_bias": (units,), "output_kernel": (units,)}

    @property
    def bits(self) -> int:
        """log2 of the number of table rows."""
        return self.table.shape[0].bit_length() - 1

    def _model(self) -> NgramModel:
        return NgramModel(
            vocab_size=self.vocab_size,
            hash_seed=self.hash_seed,
            orders=self.orders,
            table=self.table,
            scale=self.scale,
            skip=self.skip,
            hidden_kernel=self.hidden_kernel,
            hidden_bias=self.hidden_bias,
            output_kernel=self.output_kernel,
            bias=float(self.bias),
        )

    def __reduce__(self):
        # The native table stays in its process.
        return _restored, ({**self.fields(), **self.tensors()}, self.strength, self.metadata)

    def score(self, windows: np.ndarray, *, pad_id: int | None = _SAME) -> np.ndarray:
        """Scores windows; higher is better.

        Args:
          windows: `(N, T)` integer token ids, N >= 0, T >= 1.
          pad_id: replaces the scorer's own padding id for this call.

        Returns:
          `(N,)` float32. Raises `WindowError` for ids outside `[0, vocab_size)`.

        Example:
          >>> scorer = Scorer(10, 0, np.ones((16, 1), np.float32), bias=0.5)
          >>> scorer.score(np.array([[1, 2, 3]], np.int32))
          array([1.5], dtype=float32)
        """
        return self._kernel.score(windows, self.pad_id if pad_id is _SAME else pad_id)

    def quantized(self, dtype: str = "int8", *, frequencies: np.ndarray | None = None) -> Scorer:
        """Returns this scorer with a smaller table.

        Args:
          dtype: "int8" (one scale per column), "float16" or "float32".
          frequencies: `(2**bits,)` how often windows read each row; the int8 scales favour those
            that are read often. None: all alike.

        Returns:
          A scorer of that dtype. Raises `ConfigError` for another dtype, for frequencies of
          another shape, and where a weight exceeds float16.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        if frequencies is not None and np.shape(frequencies) != self.table.shape[:1]:
            raise ConfigError(
                f"frequencies have shape {np.shape(frequencies)}, expected "
                f"{self.table.shape[:1]}, one per row of the table."
            )
        if self.table.dtype == dtype:
            return self
        table = self.table.astype(np.float32) * self.scale
        scale = np.ones_like(self.scale)
        if dtype == "int8":
            table, scale = quantize_columns(table, frequencies)
        else:
            with np.errstate(over="ignore"):
                table = table.astype(dtype)
        return dataclasses.replace(self, table=table, scale=scale)

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this scorer by field name."""
        names = _TENSORS if self.hidden_kernel is None else _TENSORS + _HIDDEN
        return {name: getattr(self, name) for name in names}

    def fields(self) -> dict[str, Any]:
        """Returns the scalars that, with the tensors, make the score; JSON types."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_parts(
        cls,
        fields: dict[str, Any],
        tensors: dict[str, np.ndarray],
        *,
        strength: float,
        metadata: dict[str, Any],
    ) -> Scorer:
        """Rebuilds a scorer from its fields and tensors; raises `ConfigError` on anything else."""
        if set(fields) != set(_FIELDS):
            raise ConfigError(f"fields are {sorted(fields)[:8]}, expected {sorted(_FIELDS)}.")
        if set(tensors) not in ({*_TENSORS}, {*_TENSORS, *_HIDDEN}):
            raise ConfigError(
                f"tensors are {sorted(tensors)[:8]}, expected {list(_TENSORS)}, and for a hidden "
                f"part {list(_HIDDEN)}."
            )
        parts: dict[str, Any] = {**fields, **tensors}
        return cls(**parts, strength=strength, metadata=metadata)

    def golden_windows(self) -> np.ndarray:
        """Returns the `(8, 32)` int32 self-test windows, a function of the fields."""
        count = GOLDEN_WINDOWS * GOLDEN_LENGTH
        positions = np.arange(count, dtype=np.int32)[:, None]
        values = features.ngram_rows(positions, bits=24, hash_seed=self.hash_seed, orders=1)[:, 0]
        ids = (values % np.uint32(self.vocab_size)).astype(np.int32)
        return ids.reshape(GOLDEN_WINDOWS, GOLDEN_LENGTH)


def check_common(strength: Any, metadata: Any) -> None:
    """Checks what scorers of every kind have; raises `ConfigError`."""
    _check_number("strength", strength, finite=False)
    if not strength >= 0:
        raise ConfigError(f"strength is {strength!r}, expected 0 <= strength <= inf.")
    if not isinstance(metadata, dict):
        raise ConfigError(f"metadata is {metadata!r}, expected a dict of JSON types.")


def _restored(parts: dict[str, Any], strength: float, metadata: dict[str, Any]) -> Scorer:
    return Scorer(**parts, strength=strength, metadata=metadata)


def _first(width: int, dtype: Any) -> np.ndarray:
    skip = np.zeros(width, dtype)
    skip[0] = 1
    return skip


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, expected an int in [{low}, {high}].")


def _check_number(name: str, value: Any, *, finite: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ConfigError(f"{name} is {value!r}, expected a number.")
    # An int may be too large for a float.
    if abs(value) > sys.float_info.max and (finite or isinstance(value, int)):
        raise ConfigError(f"{name} is {value!r}, expected a finite number.")


def _check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
        raise ConfigError(f"{name} is {_seen(value)}, expected a float32 array of shape {shape}.")
    _check_finite(name, value)


def _check_finite(name: str, value: np.ndarray) -> None:
    if value.dtype != np.int8 and not np.isfinite(value).all():
        raise ConfigError(f"{name} holds NaN or inf; fit again, or inspect the labels.")


def _seen(value: Any) -> str:
    return f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
