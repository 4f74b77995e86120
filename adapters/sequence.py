"""The filter behind any sequence: kept windows by index, no state, no framework needed.

    kept = FilteredSequence(source, configure("run", order="index", keep_ratio=0.25, windows=...))
    kept[0], len(kept)

Kept index i lies in the block j with `kept_before(jM) <= i < kept_before((j+1)M)`, which is
arithmetic, so the answer is the same in any order of access and in any number of processes. Cost:
read in order, every element is read once and scored once; at random, an access may read its block.

Read next: `metagrad_filter.blocks`.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from typing import Any

from metagrad_filter.blocks import BlockFilter, Choice, FilterConfig
from metagrad_filter.errors import WindowError
from metagrad_filter.selection import block_of_kept, kept_before

# Choices are kilobytes and let access out of order skip the scorer; elements may be large.
_CHOICES_KEPT = 1024
_BLOCKS_HELD = 4


class FilteredSequence:
    """The kept windows of a sequence by index; its length is exact.

    Args:
      source: has `len` and integer indices; elements hold one window each.
      config: as from `options.configure(order="index")`.

    Raises:
      ConfigError: `run_dir` cannot be written.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
      WindowError: the source has length 0; on access also for elements that are no windows.
    """

    def __init__(self, source: Any, config: FilterConfig):
        self._source = source
        self._config = config
        self._length = len(source)
        if self._length == 0:
            raise WindowError(
                "The dataset has length 0, expected at least one window; check the source's "
                "files and earlier filters."
            )
        config.bind()
        self._start()

    def _start(self) -> None:
        self._filter = BlockFilter(self._config)
        self._lock = threading.Lock()
        self._choices: OrderedDict[int, Choice] = OrderedDict()
        self._held: OrderedDict[int, dict[int, Any]] = OrderedDict()

    def __len__(self) -> int:
        return kept_before(self._length, self._config.keep_ratio)

    def __getitem__(self, index: int) -> Any:
        return self.element(index)

    def element(self, index: int, epoch: int = 0) -> Any:
        """Returns a kept element.

        Args:
          index: in `-len .. len - 1`.
          epoch: from 0; block numbers count on over epochs, so each has its own scorer versions.

        Raises:
          IndexError: the index is out of range.
        """
        index = operator.index(index)
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"Index {index} is out of range for {length} kept windows.")
        ratio, size = self._config.keep_ratio, self._config.block_windows
        index %= length
        number = block_of_kept(index, ratio, size)
        start = number * size
        key = epoch * -(-self._length // size) + number
        rank = index - kept_before(start, ratio)
        with self._lock:
            if key not in self._choices:
                self._choose(key, start)
            self._choices.move_to_end(key)
            choice = self._choices[key]
            # Handed out once: a later stage may change an element in place.
            element = self._held.get(key, {}).pop(rank, None)
        position = int(choice.kept[rank])
        if element is None:
            element = self._source[start + position]
        return choice.annotated(position, element) if self._config.annotate else element

    def _choose(self, key: int, start: int) -> None:
        stop = min(start + self._config.block_windows, self._length)
        elements = [self._source[i] for i in range(start, stop)]
        choice = self._filter.choose(key, start, elements)
        self._choices[key] = choice
        self._held[key] = {rank: elements[p] for rank, p in enumerate(choice.kept)}
        if len(self._choices) > _CHOICES_KEPT:
            self._choices.popitem(last=False)
        if len(self._held) > _BLOCKS_HELD:
            self._held.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_source", "_config", "_length")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
