"""The filter behind any iterable, with a state that resumes; no framework needed.

    config = configure("run", keep_ratio=0.25, windows=TextWindows("tokens"))
    stream = FilteredStream(source, config)          # json.dumps(stream.state_dict()) at any step

A `FilteredStream` reads a block of M windows ahead, asks `BlockFilter` which to keep, and hands
them out in order; with `rule="threshold"` it asks `OnlineFilter` about one window at a time and
reads nothing ahead. It counts its own blocks. Most adapters are shells over it.

Where a loader has several workers or ranks, each is an iterator of its own over its own shard and
they share one ledger: the first to reach an interval decides its scorer version. They also share
the random bits of a block, keyed by (seed, name, block) as in grain's workers, so that whoever
reads the same block keeps the same windows; shards hold different windows, so no two windows are
tied to each other by this.

Cost per block: the source's own, one scorer call, and a copy of the source's state. Read next:
`metagrad_filter.blocks`; `sequence.py` for random access.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from metagrad_filter.blocks import BlockFilter, FilterConfig, annotated
from metagrad_filter.decisions import UNDECIDED
from metagrad_filter.errors import StateMismatch, WindowError
from metagrad_filter.online import OnlineFilter
from metagrad_filter.resume import check_state

_STATE_FORMAT = 1


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and set back to where it was saved."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> None: ...


class FilteredStream(Iterator[Any]):
    """Iterates once over the kept windows of a source; its state resumes at any step.

    What a resumed stream costs depends on the source. A source that is `Stateful` but no iterator
    (a loader, a dataset) is set back before it is iterated, a stateful iterator after; both then
    read again at most the block that was being handed out. Any other source is iterated from its
    start and the windows before that block are read and skipped, so it must give the same windows
    in the same order each time.

    Args:
      source: an iterable of elements that hold one window each, or a function that returns a new
        one, called when reading starts.
      config: as from `options.configure`.
      first_block: index of the first block; a loader that goes on counting over epochs sets it,
        else each pass replays the scorer versions of the first.
      may_be_empty: end quietly when there is no element, as for a worker without a shard.

    Raises:
      ConfigError: `run_dir` cannot be written.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
      WindowError: while iterating, the source is empty or its elements are no windows.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        config: FilterConfig,
        *,
        first_block: int = 0,
        may_be_empty: bool = False,
    ):
        config.bind()
        self._source = source
        self._may_be_empty = may_be_empty
        self._parent: _Parent | None = None
        # The source's state that reading starts from; None is the beginning.
        self._loaded: Any = None
        # One string: states are copied often, and a string is copied for nothing.
        self._record = json.dumps({"name": config.name, **config.record()}, sort_keys=True)
        if config.rule == "threshold":
            self._rule: _ByBlock | _ByWindow = _ByWindow(config)
        else:
            self._rule = _ByBlock(config, first_block)

    @property
    def block(self) -> int:
        """Index of the block that the next window is in."""
        return self._rule.block

    @property
    def ended(self) -> bool:
        """Whether it is known that there is no next window."""
        return self._rule.ended

    def __iter__(self) -> FilteredStream:
        return self

    def __next__(self) -> Any:
        if self._rule.ended:
            raise StopIteration
        parent = self._begin()
        try:
            return self._rule.next(parent)
        except StopIteration:
            if parent.fresh and not self._may_be_empty:
                raise WindowError(
                    "The source ended before its first element, expected at least one window; "
                    "check the source's files and earlier filters, that an iterator was not used "
                    "up before, and that there are not more workers or shards than elements."
                ) from None
            raise

    def _begin(self) -> _Parent:
        if self._parent is None:
            self._parent = _Parent(self._source, self._loaded)
            self._rule.begin(self._parent)
        return self._parent

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: JSON types as far as the source's own state is, constant structure.

        Under 1 KiB beside `parent`, the state of the source at the start of the block; with the
        threshold rule 8 KiB.
        """
        if self._parent is None and self._loaded is None:
            self._begin()
        parent = self._loaded if self._parent is None else self._rule.parent_state(self._parent)
        return {
            "parent": parent,
            **self._rule.state(),
            "filter": self._record,
            "format": _STATE_FORMAT,
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Goes to a position saved by `state_dict`; reading starts at the next window.

        Raises:
          StateMismatch: the state is another filter's; names the first field that differs.
        """
        fields = {"parent", *self._rule.state(), "filter", "format"}
        check_state(state_dict, fields, format=_STATE_FORMAT, record=self._record)
        self._rule.restore(state_dict)
        self._parent, self._loaded = None, copy.deepcopy(state_dict["parent"])


class _ByBlock:
    """Reads M windows, chooses, and hands out what is kept."""

    def __init__(self, config: FilterConfig, first_block: int):
        self._config = config
        self._filter = BlockFilter(config)
        self._first = self.block = first_block
        self._next = 0
        self._version = UNDECIDED
        self._last = False
        # The source's states before and after the block; a position never holds elements.
        self._start: Any = None
        self._after: Any = None
        self._read: list[Any] | None = None
        self._kept: list[Any] | None = None

    @property
    def ended(self) -> bool:
        return self._last and self._kept is None

    def begin(self, parent: _Parent) -> None:
        self._start = parent.state()

    def next(self, parent: _Parent) -> Any:
        while not self.ended:
            if self._kept is None:
                self._kept = self._choose(parent)
            if self._next < len(self._kept):
                element = self._kept[self._next]
                self._next += 1
                if self._next == len(self._kept):
                    self._leave()
                return element
            self._leave()
        raise StopIteration

    def _choose(self, parent: _Parent) -> list[Any]:
        config = self._config
        # Held until it is chosen from, so that a choice that failed can be asked for again.
        if self._read is None:
            self._read = list(itertools.islice(parent, config.block_windows))
            self._after = parent.state()
        elements = self._read
        if not elements:
            self._last = True
            raise StopIteration
        start = (self.block - self._first) * config.block_windows
        choice = self._filter.choose(self.block, start, elements, expected=self._version)
        kept = [int(position) for position in choice.kept]
        if config.annotate:
            chosen = [choice.annotated(position, elements[position]) for position in kept]
        else:
            chosen = [elements[position] for position in kept]
        self._version = choice.version
        self._last = len(elements) < config.block_windows
        self._read = None
        return chosen

    def _leave(self) -> None:
        self._start, self._after = self._after, None
        self.block += 1
        self._next = 0
        self._version = UNDECIDED
        self._kept = None

    def parent_state(self, parent: _Parent) -> Any:
        del parent
        return self._start

    def state(self) -> dict[str, Any]:
        return {
            "first_block": self._first,
            "block": self.block,
            "next_in_block": self._next,
            "version": self._version,
            "ended": self.ended,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._first, self.block = int(state["first_block"]), int(state["block"])
        self._next = int(state["next_in_block"])
        self._version = int(state["version"])
        self._last = bool(state["ended"])
        self._start = self._after = self._read = self._kept = None


class _ByWindow:
    """Decides on each window as it comes."""

    def __init__(self, config: FilterConfig):
        self._config = config
        self._filter = OnlineFilter(config)
        self.ended = False

    @property
    def block(self) -> int:
        return int(self._filter.state()["windows"]) // self._config.block_windows

    def begin(self, parent: _Parent) -> None:
        del parent

    def next(self, parent: _Parent) -> Any:
        for element in parent:
            decision = self._filter.offer(element)
            if decision.kept and self._config.annotate:
                return annotated(element, decision.score, decision.version)
            if decision.kept:
                return element
        self.ended = True
        raise StopIteration

    def parent_state(self, parent: _Parent) -> Any:
        return parent.state()

    def state(self) -> dict[str, Any]:
        return {"online": self._filter.state(), "ended": self.ended}

    def restore(self, state: dict[str, Any]) -> None:
        self._filter.restore(state["online"])
        self.ended = bool(state["ended"])


class _Parent(Iterator[Any]):
    """A source that is being read, with one way to ask for its state whatever it is."""

    def __init__(self, source: Any, state: Any):
        if callable(source) and not isinstance(source, Iterable):
            source = source()
        self._stateful: Any = None
        self._count = 0
        # Whether nothing was read, now or before a checkpoint.
        self.fresh = state is None
        if isinstance(source, Stateful) and not isinstance(source, Iterator):
            self._stateful = source
            if state is not None:
                self._stateful.load_state_dict(state)
            self._iterator = iter(self._stateful)
            return
        self._iterator = iter(source)
        if isinstance(self._iterator, Stateful):
            self._stateful = self._iterator
            if state is not None:
                self._stateful.load_state_dict(state)
        elif state is not None:
            self._skip(state)

    def _skip(self, state: Any) -> None:
        if not isinstance(state, dict) or set(state) != {"windows_seen"}:
            raise StateMismatch(
                f"parent in the checkpoint is {str(state)[:80]}, expected windows_seen only: the "
                "checkpoint's source saved its own state and this one does not; resume with the "
                "same kind of source."
            )
        self._count = sum(1 for _ in itertools.islice(self._iterator, int(state["windows_seen"])))
        if self._count < state["windows_seen"]:
            raise StateMismatch(
                f"windows_seen in the checkpoint is {state['windows_seen']}, the source ended "
                f"after {self._count}; resume with the source that the checkpoint was written with."
            )

    def __next__(self) -> Any:
        element = next(self._iterator)
        self._count += 1
        self.fresh = False
        return element

    def state(self) -> Any:
        if self._stateful is not None:
            return copy.deepcopy(self._stateful.state_dict())
        return {"windows_seen": self._count}
