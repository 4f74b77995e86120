"""How a loader's element becomes the array that a scorer reads.

`TextWindows("tokens").stack(elements)` gives `(M, T)` int32, `SeriesWindows("values")` gives
`(M, T, C)` float32. Both are small frozen objects that travel to worker processes. Everything that
can be wrong with an element ends in a `WindowError` that says what was seen and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, WindowError

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class TextWindows:
    """Windows of token ids.

    Attributes:
      key: which entry of a dict element holds the ids; None when the element is the array itself.
      pad_id: n-grams that hold this id are not scored; None leaves it to the scorer.
    """

    key: str | None = None
    pad_id: int | None = None

    def __post_init__(self):
        _check_key("key", self.key)
        if self.pad_id is not None and (
            isinstance(self.pad_id, bool)
            or not isinstance(self.pad_id, int)
            or not _INT32.min <= self.pad_id <= _INT32.max
        ):
            raise ConfigError(f"pad_id is {self.pad_id!r}, expected an int32 or None.")

    @property
    def kind(self) -> str:
        """The kind of scorer that reads these windows."""
        return "text"

    def stack(self, elements: Sequence[Any]) -> np.ndarray:
        """Stacks `M` elements to `(M, T)` int32; raises `WindowError`.

        Example:
          >>> TextWindows("tokens").stack([{"tokens": [1, 2]}, {"tokens": [3, 4]}]).tolist()
          [[1, 2], [3, 4]]
        """
        stacked = _stack_alike(elements, self.key, rank=1, kinds="iu")
        if stacked is None:
            arrays = _arrays(elements, self.key, rank=1, axes="(T,)")
            for position, array in enumerate(arrays):
                if array.dtype.kind not in "iu":
                    raise WindowError(
                        f"Window {position} has dtype {array.dtype}, expected integer token ids; "
                        "tokenize before the filter, or name the entry that holds ids with key=."
                    )
            stacked = np.stack(arrays)
        if stacked.dtype != np.int32:
            low, high = int(stacked.min()), int(stacked.max())
            if low < _INT32.min or high > _INT32.max:
                raise WindowError(
                    f"Token ids reach from {low} to {high}, expected ids that fit int32."
                )
            stacked = stacked.astype(np.int32)
        return stacked


@dataclass(frozen=True)
class SeriesWindows:
    """Windows of time series.

    Attributes:
      key: which entry of a dict element holds the values; None when the element is the array.
      mask_key: which entry says what was observed, `(T,)` or `(T, C)` bool; what was not observed
        becomes NaN. None takes the values as they are, NaN meaning missing.
    """

    key: str | None = None
    mask_key: str | None = None

    def __post_init__(self):
        _check_key("key", self.key)
        _check_key("mask_key", self.mask_key)
        if self.mask_key is not None and self.key is None:
            raise ConfigError("mask_key needs key=: a mask lives beside the values in a dict.")

    @property
    def kind(self) -> str:
        """The kind of scorer that reads these windows."""
        return "series"

    def stack(self, elements: Sequence[Any]) -> np.ndarray:
        """Stacks `M` elements to `(M, T, C)` float32, missing values NaN; raises `WindowError`.

        Example:
          >>> SeriesWindows().stack([np.zeros((5, 2)), np.ones((5, 2))]).shape
          (2, 5, 2)
        """
        stacked = _stack_alike(elements, self.key, rank=2, kinds="fiu")
        if stacked is None:
            arrays = _arrays(elements, self.key, rank=2, axes="(T, C)")
            for position, array in enumerate(arrays):
                if array.dtype.kind not in "fiu":
                    raise WindowError(
                        f"Window {position} has dtype {array.dtype}, expected numbers."
                    )
            stacked = np.stack(arrays)
        # Values beyond float32 become inf here, which the scorer counts as missing.
        with np.errstate(over="ignore"):
            stacked = stacked.astype(np.float32, copy=False)
        if self.mask_key is not None:
            masks = _stack_alike(elements, self.mask_key, rank=2, kinds="b")
            if masks is not None and masks.shape == stacked.shape:
                # One pass: window by window, the masks take as long as scoring does.
                np.copyto(stacked, np.nan, where=~masks)
                return stacked
            for position, element in enumerate(elements):
                mask = np.asarray(_entry(element, self.mask_key, position))
                if mask.dtype != bool or mask.shape not in (
                    stacked.shape[1:2],
                    stacked.shape[1:],
                ):
                    raise WindowError(
                        f"Mask {position} is {mask.dtype}{mask.shape}, expected bool of shape "
                        f"{stacked.shape[1:2]} or {stacked.shape[1:]}, True where observed."
                    )
                stacked[position][~mask] = np.nan
        return stacked


Windows = TextWindows | SeriesWindows


def _check_key(name: str, key: Any) -> None:
    if key is not None and not isinstance(key, str):
        raise ConfigError(f"{name} is {key!r}, expected a str or None.")


def _entry(element: Any, key: str | None, position: int) -> Any:
    if key is None:
        if isinstance(element, Mapping):
            raise WindowError(
                f"Element {position} is a dict with keys {sorted(map(str, element))}, expected "
                "an array; say which entry holds the window with key=."
            )
        return element
    if not isinstance(element, Mapping):
        raise WindowError(
            f"Element {position} is a {type(element).__name__}, expected a dict with key {key!r}; "
            "leave key=None when the element is the array itself."
        )
    if key not in element:
        raise WindowError(
            f"Element {position} has no key {key!r}, available: {sorted(map(str, element))}."
        )
    return element[key]


def _stack_alike(
    elements: Sequence[Any], key: str | None, rank: int, kinds: str
) -> np.ndarray | None:
    """Stacks what loaders usually deliver, arrays of one shape and dtype, or returns None.

    One look per element: `_arrays`, which also finds out what is wrong, takes several times as long
    and would be half the cost of scoring.
    """
    try:
        values = list(elements) if key is None else [element[key] for element in elements]
        first = values[0]
    except (KeyError, IndexError, TypeError):
        return None
    if type(first) is not np.ndarray or first.ndim != rank or first.size == 0:
        return None
    shape, dtype = first.shape, first.dtype
    if dtype.kind not in kinds or not all(
        type(value) is np.ndarray and value.shape == shape and value.dtype == dtype
        for value in values
    ):
        return None
    return np.concatenate(values).reshape(len(values), *shape)


def _arrays(elements: Sequence[Any], key: str | None, rank: int, axes: str) -> list[np.ndarray]:
    if not elements:
        raise WindowError("There are no windows to stack, expected at least one.")
    arrays: list[np.ndarray] = []
    for position, element in enumerate(elements):
        value = _entry(element, key, position)
        try:
            array = np.asarray(value)
        # Tensors that cannot become arrays raise the other two, as torch's do.
        except (TypeError, ValueError, RuntimeError) as error:
            raise WindowError(f"Window {position} is not an array: {error}") from None
        if array.ndim != rank:
            raise WindowError(
                f"Window {position} has shape {array.shape}, expected {axes}: one window per "
                "element, so filter before batching."
            )
        if array.size == 0:
            raise WindowError(f"Window {position} is empty (shape {array.shape}); drop it earlier.")
        if arrays and array.shape != arrays[0].shape:
            raise WindowError(
                f"Window {position} has shape {array.shape} and window 0 {arrays[0].shape}, "
                "expected equal lengths; pad or cut windows before the filter."
            )
        arrays.append(array)
    return arrays
