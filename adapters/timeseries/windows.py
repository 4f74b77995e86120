"""Series to windows for a loader: by index, or as a stream in bounded memory.

    source = WindowSource(series, Cut(length=24, stride=6), scaling=scaling)
    ds = grain.MapDataset.source(source).shuffle(seed=0)
    ds = WindowStream(series, Cut(length=256))                # a grain.IterDataset
    ds = score_filter(ds, "run", keep_ratio=0.25, windows=WINDOWS)

An element is `{"values": (T, C) float32, "mask": (T, C) bool, "series": name, "start": row}`, and
`"time"` where times are known. Missing values are NaN and False in the mask; `start` counts rows of
the whole series whatever stretch of it is read, so windows of different splits can be told apart.

`WindowSource` looks at every window once, when it is made, so that a bad one has no index at all;
`inspect=False` skips that reading, and then bad windows are delivered as they are, with their mask.
`WindowStream` looks while it reads: memory is a few blocks whatever the length of the series, the
next block is read while windows of the last are used, and its state (series, row) resumes exactly.
Cost: about 25 us a window of 256 steps x 8 channels on one core, half of it to judge the window.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from metagrad_filter.errors import StateMismatch, WindowError
from metagrad_filter.windows import SeriesWindows

from .cutting import REASONS, Cut, judge, windows_at
from .problems import Fate, Problems, Reason
from .scaling import Scaling
from .series import Series

WINDOWS = SeriesWindows(key="values", mask_key="mask")
"""How the filter reads an element of this adapter."""

# Rows that are read together, and windows that are judged together, as bytes of their values.
_BLOCK_BYTES = 2 << 20
_GROUP_BYTES = 1 << 20


class Dropped(NamedTuple):
    """A window that was left out, and why."""

    series: str
    start: int
    reason: Reason


class WindowSource:
    """The windows of series by index, for `grain.MapDataset.source` and other loaders.

    Cost: with `inspect`, every row is read once when this is made; an element is one small read.

    Args:
      series: what to cut; all with the same channels.
      cut: length, stride and limits.
      scaling: fitted on training series; None leaves values as they are.
      problems: counts what is dropped and noted.
      inspect: whether to look at all windows now and drop bad ones.

    Attributes:
      dropped: `Dropped(series, start, reason)` of each window left out, in order; empty without
        `inspect`.

    Raises:
      WindowError: there is no series, channels differ, or no window is left; says why.
    """

    def __init__(
        self,
        series: Sequence[Series],
        cut: Cut,
        *,
        scaling: Scaling | None = None,
        problems: Problems | None = None,
        inspect: bool = True,
    ):
        self._series = _checked(series, scaling)
        self._cut = cut
        self._scaling = scaling
        problems = Problems() if problems is None else problems
        self.dropped: list[Dropped] = []
        self._starts: list[np.ndarray | range] = []
        for one in self._series:
            if _too_short(one, cut, problems):
                self._starts.append(range(0))
            elif inspect:
                self._starts.append(self._inspected(one, problems))
            else:
                self._starts.append(range(0, len(one) - cut.length + 1, cut.step))
        self._before = [0, *itertools.accumulate(map(len, self._starts))]
        if not self._before[-1]:
            raise WindowError(
                f"{len(self._series)} series of {sum(map(len, self._series))} rows hold no window "
                f"of {cut.length} steps ({problems}); pass longer series, a smaller length=, or "
                "other limits."
            )

    def _inspected(self, one: Series, problems: Problems) -> np.ndarray:
        kept = []
        for group in _groups(one, self._cut, 0, problems):
            kept.append(group.starts[group.codes == 0])
            for position in np.flatnonzero(group.codes):
                reason = REASONS[group.codes[position] - 1]
                start = int(group.starts[position]) + one.begin
                self.dropped.append(Dropped(one.name, start, reason))
        return np.concatenate(kept)

    def __len__(self) -> int:
        return self._before[-1]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._before, index) - 1
        one = self._series[which]
        start = int(self._starts[which][index - self._before[which]])
        rows = one.read(start, start + self._cut.length)
        return _element(one, start, *_finished(rows, one.name, self._scaling))

    def dataset(self) -> grain.MapDataset:
        """Returns the windows as a grain dataset, in order."""
        return grain.MapDataset.source(self)

    def stacked(self) -> dict[str, np.ndarray]:
        """Reads all windows: each entry of the elements stacked, `values` `(N, T, C)`."""
        elements = [self[i] for i in range(len(self))]
        return {key: np.stack([e[key] for e in elements]) for key in elements[0]}

    def __repr__(self) -> str:
        return f"WindowSource({len(self)} windows of {len(self._series)} series, {self._cut})"


class WindowStream(grain.IterDataset):
    """The windows of series in order, read block by block; see `WindowSource` for the arguments.

    Memory: two blocks of rows and the store's own chunks, whatever the size of the series.

    Args:
      series: what to cut; all with the same channels.
      cut: length, stride and limits.
      scaling: fitted on training series; None leaves values as they are.
      problems: counts what is dropped and noted while this process reads.
      block_rows: rows read together; None takes 2 MiB of values, rounded to the store's chunks.

    Raises:
      WindowError: there is no series, or channels differ.
    """

    def __init__(
        self,
        series: Sequence[Series],
        cut: Cut,
        *,
        scaling: Scaling | None = None,
        problems: Problems | None = None,
        block_rows: int | None = None,
    ):
        super().__init__()
        self._series = _checked(series, scaling)
        self._cut = cut
        self._scaling = scaling
        self.problems = Problems() if problems is None else problems
        self._block_rows = block_rows

    def __iter__(self) -> grain.DatasetIterator:
        return _WindowIterator(
            self._series, self._cut, self._scaling, self.problems, self._block_rows
        )

    def __str__(self) -> str:
        return f"WindowStream({len(self._series)} series, {self._cut})"


class _WindowIterator(grain.DatasetIterator):
    """State: the series and the row at which the next window may start, never values."""

    def __init__(
        self,
        series: tuple[Series, ...],
        cut: Cut,
        scaling: Scaling | None,
        problems: Problems,
        block_rows: int | None,
    ):
        super().__init__()
        self._all = series
        self._cut = cut
        self._scaling = scaling
        self._problems = problems
        self._block_rows = block_rows
        self._source = json.dumps(
            {"cut": repr(cut), "series": len(series), "rows": sum(map(len, series))}
        )
        self._set(0, 0)

    def _set(self, which: int, row: int) -> None:
        self._which, self._row = which, row
        self._elements = self._from(which, row)

    def __next__(self) -> dict[str, Any]:
        self._which, self._row, element = next(self._elements)
        return element

    def _from(self, which: int, row: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yields elements, each with the place from which the rest follows."""
        for number in range(which, len(self._all)):
            one = self._all[number]
            first = row if number == which else 0
            if first == 0 and _too_short(one, self._cut, self._problems):
                continue
            for group in _groups(one, self._cut, first, self._problems, self._block_rows):
                good = np.flatnonzero(group.codes == 0)
                values, masks = _finished(group.windows[good], one.name, self._scaling)
                for start, window, mask in zip(group.starts[good].tolist(), values, masks):
                    # Copies: an element that is kept must not hold its neighbours in memory.
                    element = _element(one, start, window.copy(), mask.copy())
                    yield number, start + self._cut.step, element

    def get_state(self) -> dict[str, Any]:
        return {"series": self._which, "row": self._row, "source": self._source}

    def set_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or set(state) != {"series", "row", "source"}:
            raise StateMismatch(
                f"The checkpoint's state of the window stream is {state!r}, expected series, row "
                "and source; it was written by another pipeline, restore it with that one."
            )
        if state["source"] != self._source:
            raise StateMismatch(
                f"The checkpoint was written over the source {state['source']}, this one is "
                f"{self._source}; resume with the recorded series and Cut."
            )
        self._set(int(state["series"]), int(state["row"]))


class _Group(NamedTuple):
    starts: np.ndarray  # (W,) first rows, of this stretch
    windows: np.ndarray  # (W, T, C)
    codes: np.ndarray  # (W,) 0 or the reason


def _groups(
    one: Series, cut: Cut, first: int, problems: Problems, block_rows: int | None = None
) -> Iterator[_Group]:
    """Reads a series from row `first` on and judges its windows, some at a time."""
    width = one.values.shape[1]
    together = max(1, _GROUP_BYTES // (cut.length * width * 4))
    for begin, rows in _blocks(one, cut, first, block_rows):
        infinite = np.isinf(rows)
        if infinite.any():
            rows[infinite] = np.nan
            count = int(np.count_nonzero(infinite))
            problems.add(Fate.REPAIRED, Reason.NON_FINITE, count, where=_place(one, begin))
        gaps = _gaps(one, cut, begin, len(rows))
        starts = cut.starts(len(rows))
        for a in range(0, len(starts), together):
            mine = starts[a : a + together]
            windows = windows_at(rows, int(mine[0]), len(mine), cut)
            spans = None
            if gaps is not None:
                spans = gaps[mine + cut.length - 1] > gaps[mine]
            codes, noted = judge(windows, cut, gaps=spans)
            for reason, count in noted.items():
                problems.add(Fate.NOTED, reason, count, where=_place(one, begin + int(mine[0])))
            if codes.any():
                for code, count in zip(*np.unique(codes[codes > 0], return_counts=True)):
                    place = _place(one, begin + int(mine[np.argmax(codes == code)]))
                    problems.add(Fate.DROPPED, REASONS[code - 1], int(count), where=place)
            yield _Group(mine + begin, windows, codes)


def _blocks(
    one: Series, cut: Cut, first: int, block_rows: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields `(begin, rows)`; each block starts with the next window's first row."""
    size = _block_size(one, cut, block_rows)
    total, edge = len(one), first
    if first >= total:
        return
    carried: np.ndarray | None = None
    begin = first
    ahead = _ask(one, edge, _next_edge(one, edge, size))
    while edge < total:
        stop = _next_edge(one, edge, size)
        fresh = one.numbers(ahead())
        if stop < total:
            ahead = _ask(one, stop, _next_edge(one, stop, size))
        edge = stop
        rows = fresh if carried is None else np.concatenate([carried, fresh])
        windows = cut.count(len(rows))
        if windows:
            yield begin, rows
        taken = min(windows * cut.step, len(rows))
        # A stride beyond the window's length may begin the next window after this block.
        if windows * cut.step > len(rows):
            edge = begin + windows * cut.step
            begin, carried = edge, None
            if edge < total:
                ahead = _ask(one, edge, _next_edge(one, edge, size))
            continue
        carried = rows[taken:].copy()
        begin += taken


def _block_size(one: Series, cut: Cut, block_rows: int | None) -> int:
    width = one.values.shape[1] * np.dtype(one.values.dtype).itemsize
    size = max(_BLOCK_BYTES // width, 1) if block_rows is None else block_rows
    chunk = getattr(one.values, "chunk_rows", 1)
    return max(-(-max(size, cut.length) // chunk) * chunk, 1)


def _next_edge(one: Series, row: int, size: int) -> int:
    """End of the block that begins at `row`: blocks end where those of the whole store do."""
    absolute = one.begin + row
    return min((absolute // size + 1) * size - one.begin, len(one))


def _ask(one: Series, a: int, b: int):
    """Begins to read rows where the store can; returns a function that waits for them."""
    a, b = one.begin + a, one.begin + b
    ask = getattr(one.values, "ask", None)
    return (lambda: one.values[a:b]) if ask is None else ask(a, b)


def _gaps(one: Series, cut: Cut, begin: int, rows: int) -> np.ndarray | None:
    """How many gaps lie before each row of a block, `(rows,)`; None where nothing limits them."""
    if cut.max_gap is None:
        return None
    times = one.times_of(begin, begin + rows)
    if times is None:
        return None
    return np.concatenate([[0], np.cumsum(np.diff(times) > cut.max_gap)])


def _finished(
    rows: np.ndarray, name: str, scaling: Scaling | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales `(..., C)` rows that are the caller's own; returns float32 values and their mask."""
    if scaling is not None:
        rows = scaling.apply(rows, name)
    if rows.dtype != np.float32:
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32)
    mask = np.isfinite(rows)
    if np.isinf(rows).any():
        rows[~mask] = np.nan
    return rows, mask


def _element(one: Series, start: int, values: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    element = {
        "values": values,
        "mask": mask,
        "series": one.name,
        "start": np.int64(one.begin + start),
    }
    if (times := one.times_of(start, start + 1)) is not None:
        element["time"] = times[0]
    return element


def _checked(series: Sequence[Series], scaling: Scaling | None) -> tuple[Series, ...]:
    series = tuple(series)
    if not series:
        raise WindowError("There is no series to cut; pass at least one.")
    channels = series[0].channels if scaling is None else scaling.channels
    expected = f"series {series[0].name!r}" if scaling is None else "the scaling"
    for one in series:
        if one.channels != channels:
            raise WindowError(
                f"Series {one.name!r} has the channels {list(one.channels)}, {expected} has "
                f"{list(channels)}; select the same channels in the same order."
            )
    return series


def _too_short(one: Series, cut: Cut, problems: Problems) -> bool:
    if len(one) >= cut.length:
        return False
    problems.add(Fate.DROPPED, Reason.TOO_SHORT, where=f"series {one.name!r} of {len(one)} rows")
    return True


def _place(one: Series, row: int) -> str:
    return f"series {one.name!r} from row {one.begin + row}"
