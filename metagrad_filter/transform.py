"""The grain transformation: the same kind of dataset comes back, shorter.

    ds = score_filter(ds, run_dir, keep_ratio=0.25, windows=TextWindows("tokens"))

Two homes. Over a `MapDataset` a block is M consecutive indices, so the stream is the same for any
number of workers, threads and hosts; prefer it, and shuffle before it. Over an `IterDataset` (after
interleave, mix or packing) each iterator counts its own blocks: the stream is reproducible for a
fixed number of workers. Either way exactly `floor((j+1) M r) - floor(j M r)` windows of block j are
kept, in input order, and a resumed or repeated iteration gives the same windows.

Where it goes: after shuffle, mix and packing (an element of a `MapDataset` costs its whole block if
the access order is random), before `batch` and `mp_prefetch`. Over a `MapDataset`
batch before `to_iter_dataset`: grain's workers share out what is indexed, and only then are the
batches too the same for any number of workers. Every worker reads the whole of each block that it
delivers a window of, so a batch of k windows, or read threads in place of workers, saves reading.
Repeat a `MapDataset` before or after the filter; over an `IterDataset` repeat and interleave before
it: a filter that starts anew in every epoch or file would stay on its first scorer version, and is
refused.

Tail rule: the last block of an epoch may be shorter than M. It keeps its part of the quota,
`floor(N r) - floor(j M r)`, ranked among itself, so an epoch of N windows keeps `floor(N r)`.

Read next: `blocks.py` (how a block is chosen).
"""

from __future__ import annotations

import contextlib
import copy
import json
import operator
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import grain

from metagrad_filter.blocks import BlockFilter, Choice, FilterConfig, annotated
from metagrad_filter.decisions import UNDECIDED
from metagrad_filter.errors import ConfigError, StateMismatch, WindowError
from metagrad_filter.online import OnlineFilter
from metagrad_filter.resume import check_state
from metagrad_filter.selection import Cap, block_of_kept, kept_before
from metagrad_filter.windows import Windows

_STATE_FORMAT = 2

# Choices of this many blocks are remembered (kilobytes each, for access out of order), and kept
# elements that nobody took yet only of the newest few: sequential reading needs no more.
_BLOCKS_KEPT = 1024
_ELEMENTS_KEPT = 32

# Elements that one thread reads at a time while several fill the same block.
_CHUNK = 16


def score_filter(
    ds: grain.MapDataset | grain.IterDataset,
    run_dir: str | os.PathLike[str],
    *,
    keep_ratio: float,
    windows: Windows,
    block_windows: int = 512,
    swap_every_blocks: int = 64,
    seed: int = 0,
    name: str = "default",
    explore: float = 0.0,
    annotate: bool = False,
    caps: Cap | Sequence[Cap] = (),
    rule: str = "block",
    bad_windows: str = "raise",
    source_key: str | None = None,
    statistics: bool = True,
    spool_share: float = 0.0,
) -> Any:
    """Keeps the windows of a grain dataset that the published scorers rank highest.

    Before the first scorer is published a seeded uniform choice is kept. Which version ranks an
    interval of `swap_every_blocks` blocks is decided once, when the interval is first reached, and
    recorded in `run_dir/ledger/<name>`; iterating again or resuming replays it.

    Args:
      ds: elements hold one window each.
      run_dir: directory shared with the calibrator, or a `gs://`, `s3://` or `memory://` URL.
      keep_ratio: share of windows kept, in (0, 1]; 1 leaves the dataset unchanged.
      windows: how an element becomes an array, `TextWindows` or `SeriesWindows`.
      block_windows: M, windows ranked together; 256 or more loses little against a global ranking.
      swap_every_blocks: blocks between possible changes of the scorer version.
      seed: keys the uniform choice, the exploration share and Gumbel ranking.
      name: one per filter of a run.
      explore: share of the kept windows drawn uniformly, in [0, 1].
      annotate: add `score` (float32, NaN where uniform) and `scorer_version` (int, 0 where uniform)
        to copies of the kept elements, which must be dicts.
      caps: limits on how many kept windows of a block may share a source, a cluster or their
        content, for instance `Cap("source", share=0.5)`.
      rule: "block" reads M windows and keeps exactly its quota; "threshold" decides on one window
        at a time without reading ahead and holds the ratio within one percentage point over any
        10,000 windows (`IterDataset` only).
      bad_windows: "raise" ends with a `WindowError` where a window cannot be read; "last" ranks it
        last, warns once and counts it (`mgf.counters(name)`).
      source_key: the entry that names a window's source; the monitor then shows each one's share,
        and the gate of calibration on the spool refuses a scorer that starves one.
      statistics: append what was seen and kept to `run_dir/metrics`, for the monitor.
      spool_share: share of raw windows that is set aside in `run_dir/spool`, bounded, so that a
        calibrator can read the stream itself: `Calibrator(windows=SpooledWindows(run_dir))`.

    Returns:
      A dataset of the same kind.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      WindowError: the dataset is empty; while iterating also for unreadable elements.
      StateMismatch: `name` was used in `run_dir` with another configuration.

    Example::

      ds = grain.MapDataset.source(source).shuffle(seed=0)
      ds = score_filter(ds, "run", keep_ratio=0.25, windows=TextWindows("tokens"))
      ds = ds.batch(32).to_iter_dataset()
    """
    if isinstance(ds, grain.MapDataset):
        order = "index"
    elif isinstance(ds, grain.IterDataset):
        order = "iterator"
    else:
        raise ConfigError(
            f"ds is a {type(ds).__name__}, expected a grain.MapDataset or grain.IterDataset; "
            "metagrad_filter.adapters has filters for other loaders."
        )
    config = FilterConfig(
        run_dir=os.fspath(run_dir),
        keep_ratio=keep_ratio,  # pyright: ignore[reportArgumentType]
        windows=windows,
        block_windows=block_windows,
        swap_every_blocks=swap_every_blocks,
        seed=seed,
        name=name,
        explore=explore,  # pyright: ignore[reportArgumentType]
        annotate=annotate,
        caps=caps,  # pyright: ignore[reportArgumentType]
        rule=rule,
        bad_windows=bad_windows,
        source_key=source_key,
        statistics=statistics,
        spool_share=spool_share,
        order=order,
    )
    if isinstance(ds, grain.MapDataset):
        if rule == "threshold":
            raise ConfigError(
                "rule='threshold' decides in the order of arrival, a MapDataset has none; use the "
                "block rule, or filter ds.to_iter_dataset()."
            )
        return ScoreFilterMapDataset(ds, config)
    return ScoreFilterIterDataset(ds, config)


class ScoreFilterMapDataset(grain.MapDataset):
    """Random-access filter; see `score_filter`.

    Output index i lies in the block j with `kept_before(jM) <= i < kept_before((j+1)M)`. Indices
    beyond the length belong to later epochs, as everywhere in grain: epoch e reads the parent's
    indices from e N on, and block numbers go on counting.
    """

    _MUTATES_ELEMENT_SPEC = False

    def __init__(self, parent: grain.MapDataset, config: FilterConfig):
        super().__init__(parent)
        if len(parent) == 0:
            raise WindowError(
                "The dataset has length 0, expected at least one window; check the source's "
                "files, its slice (ds[i::n] with n larger than the source) and earlier filters."
            )
        config.bind()
        self._config = config
        self._MUTATES_ELEMENT_SPEC = config.annotate

    def __len__(self) -> int:
        return kept_before(len(self._parent), self._config.keep_ratio)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        index = operator.index(index)
        blocks = self._blocks()
        if blocks.kept_per_epoch == 0:
            raise IndexError(f"Index {index}: keep_ratio keeps none of {blocks.length} windows.")
        if index < 0:
            index %= blocks.kept_per_epoch
        return _record_output(self, blocks.element(index))

    def _blocks(self) -> _Blocks:
        # setdefault is atomic, so grain's read threads agree on one cache without a lock in the
        # dataset, which must stay picklable.
        blocks = self.__dict__.get("_cache")
        if blocks is None:
            fresh = _Blocks(self._parent, self._config)
            blocks = self.__dict__.setdefault("_cache", fresh)  # pyright: ignore
        return blocks

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_cache"}

    @property
    def _element_spec(self) -> Any:
        return _element_spec(self._parent, self._config)

    def __str__(self) -> str:
        return _describe("ScoreFilterMapDataset", self._config)


class _Blocks:
    """The blocks of a `MapDataset`, each read and chosen once however many threads ask."""

    def __init__(self, parent: grain.MapDataset, config: FilterConfig):
        self.length = len(parent)
        self.kept_per_epoch = kept_before(self.length, config.keep_ratio)
        self._parent = parent
        self._config = config
        self._filter = BlockFilter(config)
        self._per_epoch = -(-self.length // config.block_windows)
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, _Block] = OrderedDict()
        self._holding: deque[_Block] = deque()

    def element(self, index: int) -> Any:
        """Returns the kept element `index >= 0`."""
        config = self._config
        epoch, index = divmod(index, self.kept_per_epoch)
        number = block_of_kept(index, config.keep_ratio, config.block_windows)
        start = number * config.block_windows
        rank = index - kept_before(start, config.keep_ratio)
        block = self._block(epoch, number, start)
        choice = block.choice()
        position = int(choice.kept[rank])
        element = block.take(rank)
        if element is None:
            element = self._read([epoch * self.length + start + position])[0]
        return choice.annotated(position, element) if config.annotate else element

    def _block(self, epoch: int, number: int, start: int) -> _Block:
        key = epoch * self._per_epoch + number
        with self._lock:
            block = self._cache.get(key)
            if block is None or block.failed:
                stop = min(start + self._config.block_windows, self.length)
                offset = epoch * self.length
                block = self._cache[key] = _Block(
                    range(offset + start, offset + stop),
                    self._read,
                    lambda elements: self._filter.choose(key, start, elements),
                )
                self._holding.append(block)
                if len(self._holding) > _ELEMENTS_KEPT:
                    self._holding.popleft().drop()
            self._cache.move_to_end(key)
            if len(self._cache) > _BLOCKS_KEPT:
                self._cache.popitem(last=False)
        return block

    def _read(self, indices: Sequence[int]) -> list[Any]:
        elements = []
        for index in indices:
            element = self._parent[index]
            if element is None:
                raise WindowError(
                    f"Element {index} is None: the dataset before the filter is sparse. Convert "
                    "it first, score_filter(ds.to_iter_dataset(), ...), so that missing "
                    "elements are skipped and blocks are full."
                )
            elements.append(element)
        return elements


class _Block:
    """One block: filled together by all threads that need it, chosen by the last to finish."""

    def __init__(
        self,
        indices: range,
        read: Callable[[Sequence[int]], list[Any]],
        choose: Callable[[list[Any]], Choice],
    ):
        self._indices = indices
        self._read = read
        self._choose = choose
        self._elements: list[Any] = [None] * len(indices)
        self._lock = threading.Lock()
        self._chunks = iter(range(0, len(indices), _CHUNK))
        self._unread = -(-len(indices) // _CHUNK)
        self._done = threading.Event()
        self._choice: Choice | None = None
        self._error: BaseException | None = None
        self._kept: dict[int, Any] = {}
        self._dropped = False

    @property
    def failed(self) -> bool:
        return self._error is not None

    def choice(self) -> Choice:
        """Returns the block's choice, after helping to read it if that is still going on."""
        if self._choice is None:
            # Helping instead of waiting keeps a slow source as parallel as without the filter.
            try:
                while self._help():
                    pass
            except BaseException as error:
                self._error = error
                self._done.set()
                raise
            self._done.wait()
        if self._choice is None:
            assert self._error is not None
            raise self._error
        return self._choice

    def _help(self) -> bool:
        with self._lock:
            start = next(self._chunks, None)
        if start is None or self.failed:
            return False
        chunk = self._indices[start : start + _CHUNK]
        self._elements[start : start + _CHUNK] = self._read(chunk)
        with self._lock:
            self._unread -= 1
            last = self._unread == 0
        if last:
            choice = self._choose(self._elements)
            if not self._dropped:
                self._kept = {rank: self._elements[p] for rank, p in enumerate(choice.kept)}
            self._elements = []
            self._choice = choice
            self._done.set()
        return not last

    def take(self, rank: int) -> Any | None:
        """Hands out a kept element once: a later stage may change it in place."""
        return self._kept.pop(rank, None)

    def drop(self) -> None:
        """Forgets the elements; the choice stays."""
        self._dropped = True
        self._kept = {}


class ScoreFilterIterDataset(grain.IterDataset):
    """Streaming filter; see `score_filter`."""

    _MUTATES_ELEMENT_SPEC = False

    def __init__(self, parent: grain.IterDataset, config: FilterConfig):
        super().__init__(parent)
        config.bind()
        self._config = config
        self._MUTATES_ELEMENT_SPEC = config.annotate

    def __iter__(self) -> grain.DatasetIterator:
        _refuse_interleave()
        if self._config.rule == "threshold":
            return _ThresholdDatasetIterator(self._parent.__iter__(), self._config)
        return _ScoreFilterDatasetIterator(self._parent.__iter__(), self._config)

    @property
    def _element_spec(self) -> Any:
        return _element_spec(self._parent, self._config)

    def __str__(self) -> str:
        return _describe("ScoreFilterIterDataset", self._config)


class _FilterDatasetIterator(grain.DatasetIterator):
    """What both rules share: state that names the filter it belongs to, and grain's manners."""

    _MUTATES_ELEMENT_SPEC = False

    def __init__(self, parent: grain.DatasetIterator, config: FilterConfig):
        super().__init__(parent)
        self._config = config
        self._record = json.dumps(config.record(), sort_keys=True)
        self._at_start = True

    def _state(self, parent: dict[str, Any], **own: Any) -> dict[str, Any]:
        if self._at_start:
            _refuse_repeat()
        return {
            "parent": parent,
            **own,
            "filter": self._record,
            "workers": _workers(self),
            "format": _STATE_FORMAT,
        }

    def _check_state(self, state: Any, *own: str) -> None:
        fields = {"parent", *own, "filter", "workers", "format"}
        check_state(state, fields, format=_STATE_FORMAT, record=self._record)
        if state["workers"] != _workers(self):
            raise StateMismatch(
                f"The checkpoint was written with num_workers={state['workers']!r} and is restored "
                f"with {_workers(self)}; over an IterDataset every worker counts its own blocks, "
                "so resume with the same number, or filter a MapDataset."
            )


class _ScoreFilterDatasetIterator(_FilterDatasetIterator):
    """Reads a block from the parent, chooses, and hands out what is kept.

    State: the parent's state at the start of the block and the position in it, never elements. An
    iterator above may set an older state and read again; the ledger makes the answer the same.
    """

    def __init__(self, parent: grain.DatasetIterator, config: FilterConfig):
        super().__init__(parent, config)
        self._filter = BlockFilter(config)
        self._start: dict[str, Any] | None = None
        self._after: dict[str, Any] | None = None
        self._block = 0
        self._next = 0
        self._version = UNDECIDED
        self._kept: list[Any] | None = None

    def __next__(self) -> Any:
        self._assert_not_closed()
        while True:
            if self._kept is None:
                self._read_block()
            assert self._kept is not None
            if self._next < len(self._kept):
                element = self._kept[self._next]
                self._next += 1
                if self._next == len(self._kept):
                    self._leave_block()
                return _record_output(self, element)
            self._leave_block()

    def _read_block(self) -> None:
        config = self._config
        if self._start is None:
            self._start = copy.deepcopy(self._parent.get_state())
        self._at_start = False
        elements = []
        with contextlib.suppress(StopIteration):
            while len(elements) < config.block_windows:
                elements.append(next(self._parent))
        if not elements:
            if self._block == 0:
                raise _empty()
            raise StopIteration
        self._after = copy.deepcopy(self._parent.get_state())
        with _self_time(self):
            choice = self._filter.choose(
                self._block,
                self._block * config.block_windows,
                elements,
                expected=self._version,
            )
            self._version = choice.version
            kept = [int(position) for position in choice.kept]
            if config.annotate:
                self._kept = [choice.annotated(p, elements[p]) for p in kept]
            else:
                self._kept = [elements[p] for p in kept]

    def _leave_block(self) -> None:
        self._start, self._after = self._after, None
        self._block += 1
        self._next = 0
        self._version = UNDECIDED
        self._kept = None

    def get_state(self) -> dict[str, Any]:
        parent = self._parent.get_state() if self._start is None else self._start
        return self._state(
            parent, block=self._block, next_in_block=self._next, version=self._version
        )

    def set_state(self, state: dict[str, Any]) -> None:
        self._check_state(state, "block", "next_in_block", "version")
        self._parent.set_state(state["parent"])
        self._start, self._after = state["parent"], None
        self._block = int(state["block"])
        self._next = int(state["next_in_block"])
        self._version = int(state["version"])
        self._kept = None

    def __str__(self) -> str:
        return _describe("ScoreFilterDatasetIterator", self._config)


class _ThresholdDatasetIterator(_FilterDatasetIterator):
    """Decides on each window as it comes; state is the parent's, and the rule's few kilobytes."""

    def __init__(self, parent: grain.DatasetIterator, config: FilterConfig):
        super().__init__(parent, config)
        self._online = OnlineFilter(config)

    def __next__(self) -> Any:
        self._assert_not_closed()
        while True:
            try:
                element = next(self._parent)
            except StopIteration:
                if self._at_start:
                    raise _empty() from None
                raise
            self._at_start = False
            with _self_time(self):
                decision = self._online.offer(element)
                if decision.kept and self._config.annotate:
                    element = annotated(element, decision.score, decision.version)
            if decision.kept:
                return _record_output(self, element)

    def get_state(self) -> dict[str, Any]:
        return self._state(self._parent.get_state(), online=self._online.state())

    def set_state(self, state: dict[str, Any]) -> None:
        self._check_state(state, "online")
        self._parent.set_state(state["parent"])
        self._online.restore(state["online"])

    def __str__(self) -> str:
        return _describe("ThresholdFilterDatasetIterator", self._config)


def _describe(name: str, config: FilterConfig) -> str:
    return (
        f"{name}(name={config.name!r}, keep_ratio={config.keep_ratio}, "
        f"block_windows={config.block_windows})"
    )


def _empty() -> WindowError:
    return WindowError(
        "The dataset ended before its first element, expected at least one window; check the "
        "source's files and earlier filters, and that there are not more workers or shards than "
        "elements."
    )


# A filter inside an interleave starts anew in every file, and one below a repeat in every epoch:
# both would stay on the first scorer version for ever. grain tells a dataset nothing about what is
# built on it, so the callers on the stack are asked; where their names change, nothing is refused.
_SHARDS = {"ProcessPrefetchIterDataset", "_MpContextIterDataset"}  # grain's own workers


def _refuse_interleave() -> None:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_add_prefetch_and_make_iterator":
            if type(frame.f_locals.get("ds")).__name__ not in _SHARDS:
                raise ConfigError(
                    "score_filter stands inside an InterleaveIterDataset, where it starts anew in "
                    "every file; put it after the interleave: "
                    "score_filter(InterleaveIterDataset(...), ...)."
                )
            return
        frame = frame.f_back


def _refuse_repeat() -> None:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname == "_RepeatDatasetIterator.__init__":
            raise ConfigError(
                "score_filter stands before a RepeatIterDataset, which would replay the scorer "
                "versions of the first epoch in every other; repeat before the filter "
                "(MapDataset.repeat, or RepeatIterDataset below score_filter)."
            )
        frame = frame.f_back


def _workers(iterator: grain.DatasetIterator) -> int:
    """Returns how many grain workers share the dataset; 1 where that is not known."""
    context = getattr(getattr(iterator, "_ctx", None), "mp_context", None)
    return int(getattr(context, "process_count", 1))


def _element_spec(parent: Any, config: FilterConfig) -> Any:
    spec = grain.experimental.get_element_spec(parent)
    if not config.annotate:
        return spec
    leaf = grain.experimental.ShapeDtypeStruct
    return {**spec, "score": leaf((), "float32"), "scorer_version": leaf((), "int64")}


# Statistics are not part of grain's public interface: used where present, never required.


def _record_output(node: Any, element: Any) -> Any:
    record = getattr(getattr(node, "_stats", None), "record_output_spec", None)
    return element if record is None else record(element)


def _self_time(node: Any) -> contextlib.AbstractContextManager[Any]:
    record = getattr(getattr(node, "_stats", None), "record_self_time", None)
    return contextlib.nullcontext() if record is None else record()
