"""Raw windows of the stream for calibration: a small uniform sample, spooled beside the filter.

    Spool(run_dir, name).offer(block, windows)      SpooledWindows(run_dir, name).take(index)

A streaming source cannot be asked for a window twice, so the filter, which sees every raw window,
writes about one in fifty to `run_dir/spool/<name>`. Which ones is a pure function of seed, name and
block: a block that is read again after a resume is sampled alike, and readers drop the copies.

Each file appears whole under a name that says its place in the order, its writer, size and CRC:
`%010d-<session>-<bytes>-<crc32>.safetensors`; any number of processes write at once. Where the
folder holds more than its limit, the oldest files go. Nothing that happens here reaches the loader:
what cannot be written is counted, and sampling pauses.

Cost: one draw a block (about 20 us for 512 windows) and a copy of what is sampled; a thread writes
one file per MiB of sample.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.util
import os
import re
import secrets
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.selection import philox_bits
from metagrad_filter.store import check_key, open_store
from metagrad_filter.windows import SeriesWindows, TextWindows

FOLDER = "spool"
LIMIT_BYTES = 256 * 2**20
FILE_BYTES = 2**20

_NAME = re.compile(r"(\d{10})-[0-9a-f]{12}-(\d{1,12})-([0-9a-f]{8})\.safetensors", re.ASCII)
_PURPOSE = 5  # of the Philox draw; selection uses 0 and 1
_AGE_SECONDS = 60.0  # after which a sample is written though it fills no file
_PAUSE_SECONDS = 60.0  # without sampling, after a file could not be written
_BACKLOG = 4  # files' worth of sample held in memory while a file is being written
_MOST_FILES = 4096
_MAX_FILE_BYTES = 2**30


@dataclass
class SpoolCounters:
    """What one spool did in this process.

    Attributes:
      windows: sampled and written.
      files: written.
      removed_files: oldest files removed to stay within the limit.
      unreadable: sampled windows that could not be read as windows and were left out.
      lost_windows: sampled and given up: a file could not be written, or writing fell behind.
      failures: files that could not be written.
    """

    windows: int = 0
    files: int = 0
    removed_files: int = 0
    unreadable: int = 0
    lost_windows: int = 0
    failures: int = 0


class Spool:
    """Samples raw windows into `run_dir/spool/<name>`; thread-safe, and safe to fork and to spawn.

    Args:
      run_dir: directory or URL, see `open_store`.
      name: the filter's.
      share: of the windows offered that is sampled, in (0, 1].
      limit_bytes: what the folder may hold, over all processes; the newest file always stays.
      seed: the filter's; with `name` and the block it keys the draw.
      file_bytes: windows' bytes in one file.
      clock: seconds, monotonic.

    Raises:
      ConfigError: an argument is out of its domain.

    Example:
      >>> spool = Spool(run_dir, "train")                                   # doctest: +SKIP
      >>> spool.offer(block, windows, keep_probability=0.25, kept=kept)     # doctest: +SKIP
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        name: str = "default",
        *,
        share: float = 0.02,
        limit_bytes: int = LIMIT_BYTES,
        seed: int = 0,
        file_bytes: int = FILE_BYTES,
        clock=time.monotonic,
    ):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"share={share!r}; expected a number in (0, 1].")
        for field, value, least in (
            ("limit_bytes", limit_bytes, 1),
            ("file_bytes", file_bytes, 1),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{field}={value!r}; expected an integer >= {least}.")
        self._arguments = (run_dir, name, share, limit_bytes, seed, file_bytes, clock)
        self._store, self._folder = open_store(run_dir), _folder(name)
        self._name, self._share, self._limit, self._seed = name, share, limit_bytes, seed
        self._file_bytes, self._clock = file_bytes, clock
        self._begin()

    def _begin(self) -> None:
        """Starts over with nothing buffered: a forked child's buffer is its parent's to write."""
        self._pid = os.getpid()
        self._session = secrets.token_hex(6)
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._buffer: list[dict[str, np.ndarray]] = []
        self._bytes, self._since = 0, 0.0
        self._writer: threading.Thread | None = None
        self._paused_until: float | None = None
        self._warned = False
        self._counters = SpoolCounters()
        # `atexit` does not run in worker processes, this does. It is weak: a spool that goes
        # earlier is written by `__del__`.
        multiprocessing.util.Finalize(self, _flush, (weakref.ref(self),), exitpriority=10)

    def __del__(self):
        if getattr(self, "_buffer", None):
            self.flush()

    def __reduce__(self):
        return _spool, self._arguments

    @property
    def counters(self) -> SpoolCounters:
        """What this process did so far."""
        return self._counters

    def positions(self, block: int, n: int) -> np.ndarray:
        """Which of a block's `n` windows are sampled: `(m,)` ascending; none while paused."""
        if self._pid != os.getpid():
            self._begin()
        if self._paused_until is not None and self._clock() < self._paused_until:
            return np.empty(0, np.int64)
        bits = philox_bits(self._seed, self._name, block, _PURPOSE, n)
        return np.flatnonzero((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self._share)

    def offer(
        self,
        block: int,
        windows: np.ndarray,
        *,
        keep_probability: float | np.ndarray | None = None,
        kept: np.ndarray | None = None,
        sources: Sequence[str] | None = None,
    ) -> int:
        """Samples a raw block, before anything is dropped from it.

        Args:
          block: the block's index, counted on over epochs.
          windows: `(n, T)` integers or `(n, T, C)` floats, all windows of the block.
          keep_probability: with which each window is kept, one number or `(n,)`; None where it is
            not known.
          kept: `(k,)` positions that are kept, or None where that is not known.
          sources: name of the source of each of the n windows, or None where that is not known;
            64 bytes of a name are stored.

        Returns:
          How many windows were sampled. Raises `WindowError` when `windows` has another shape or
          dtype, and never because of the disk.
        """
        kinds = {2: "iu", 3: "f"}.get(windows.ndim, "")
        if windows.dtype.kind not in kinds:
            raise WindowError(
                f"windows are {windows.dtype}{windows.shape}; expected (n, T) integers or "
                "(n, T, C) floats."
            )
        n = len(windows)
        chosen = self.positions(block, n)
        if len(chosen):
            dtype = np.int32 if windows.ndim == 2 else np.float32
            sampled = windows[chosen].astype(dtype)
            self._add(block, n, chosen, sampled, keep_probability, kept, sources)
        return len(chosen)

    def offer_elements(
        self,
        block: int,
        elements: Sequence[Any],
        windows: TextWindows | SeriesWindows,
        *,
        keep_probability: float | np.ndarray | None = None,
        kept: np.ndarray | None = None,
        sources: Sequence[str] | None = None,
    ) -> int:
        """Like `offer`, for a loader's elements: only the sampled ones are read as windows.

        One that cannot be read as a window is left out and counted.
        """
        n = len(elements)
        chosen = self.positions(block, n)
        if not len(chosen):
            return 0
        try:
            stacked = windows.stack([elements[i] for i in chosen])
        except WindowError:
            chosen, stacked = self._readable(chosen, elements, windows)
            if stacked is None:
                return 0
        self._add(block, n, chosen, stacked, keep_probability, kept, sources)
        return len(chosen)

    def flush(self) -> None:
        """Writes what is buffered, in this thread."""
        if self._pid != os.getpid():
            return
        writer = self._writer
        if writer is not None and writer is not threading.current_thread():
            writer.join()
        self._write(self._take_buffer())

    def _readable(self, chosen, elements, windows) -> tuple[np.ndarray, np.ndarray | None]:
        good: list[int] = []
        arrays: list[np.ndarray] = []
        for i in chosen.tolist():
            try:
                array = windows.stack([elements[i]])
            except WindowError:
                self._counters.unreadable += 1
                continue
            if arrays and array.shape != arrays[0].shape:
                self._counters.unreadable += 1
                continue
            good.append(i)
            arrays.append(array)
        return np.array(good, np.int64), np.concatenate(arrays) if arrays else None

    def _add(self, block, n, chosen, windows, keep_probability, kept, sources) -> None:
        m = len(chosen)
        probability = np.asarray(np.nan if keep_probability is None else keep_probability)
        was_kept = np.full(m, -1, np.int8)
        if kept is not None:
            flags = np.zeros(n, np.int8)
            flags[kept] = 1
            was_kept = flags[chosen]
        part = {
            "windows": windows,
            "blocks": np.full(m, block, np.int64),
            "positions": chosen.astype(np.int64),
            "keep_probability": np.full(
                m, probability[chosen] if probability.ndim else probability, np.float32
            ),
            "kept": was_kept,
            "source": _encoded([] if sources is None else [sources[i] for i in chosen], m),
        }
        with self._lock:
            shapes = {part["windows"].shape[1:] for part in self._buffer[:1]}
        if shapes - {windows.shape[1:]}:
            self.flush()  # one file holds windows of one shape
        with self._lock:
            if self._bytes >= _BACKLOG * self._file_bytes:
                self._counters.lost_windows += m
                return
            if not self._buffer:
                self._since = self._clock()
            self._buffer.append(part)
            self._bytes += windows.nbytes
            old = self._clock() - self._since > _AGE_SECONDS
            busy = self._writer is not None and self._writer.is_alive()
            if busy or not (old or self._bytes >= self._file_bytes):
                return
            writer = threading.Thread(
                target=lambda: self._write(self._take_buffer()), name="metagrad-spool", daemon=True
            )
            # Where no thread can be started any more, the buffer stays bounded and is flushed last.
            with contextlib.suppress(RuntimeError):
                writer.start()
                self._writer = writer

    def _take_buffer(self) -> list[dict[str, np.ndarray]]:
        with self._lock:
            parts, self._buffer, self._bytes = self._buffer, [], 0
        return parts

    def _write(self, parts: list[dict[str, np.ndarray]]) -> None:
        if not parts:
            return
        tensors = {
            name: np.ascontiguousarray(np.concatenate([part[name] for part in parts]))
            for name in parts[0]
        }
        count = len(tensors["blocks"])
        if not tensors["source"].any():
            del tensors["source"]  # no name is known: not worth 64 bytes a window
        data = safetensors.numpy.save(tensors)
        with self._writing:
            try:
                self._make_room(len(data))
                number = max((int(m[1]) for m in self._files()), default=0) + 1
                tail = f"{self._session}-{len(data)}-{zlib.crc32(data):08x}.safetensors"
                self._store.write_once(f"{self._folder}/{number:010d}-{tail}", data)
            except OSError as error:
                self._counters.failures += 1
                self._counters.lost_windows += count
                self._paused_until = self._clock() + _PAUSE_SECONDS
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"Windows for calibration cannot be written to "
                        f"{self._store.describe(self._folder)}: {error}; the filter goes on, and "
                        f"sampling is tried again every {_PAUSE_SECONDS:.0f} seconds. Free space "
                        "or fix the permissions.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                return
            self._paused_until = None
            self._counters.files += 1
            self._counters.windows += count

    def _make_room(self, wanted: int) -> None:
        files = sorted(self._files(), key=lambda m: m[0])
        held = sum(int(m[2]) for m in files) + wanted
        # A listing that another process changes meanwhile costs a file more or less, no error.
        while files and (held > self._limit or len(files) >= _MOST_FILES):
            oldest = files.pop(0)
            self._store.remove(f"{self._folder}/{oldest[0]}")
            held -= int(oldest[2])
            self._counters.removed_files += 1

    def _files(self) -> list[re.Match[str]]:
        return [m for name in self._store.names(self._folder) if (m := _NAME.fullmatch(name))]


class SpooledWindows:
    """Random access to what a spool holds, as of the last `refresh`.

    Positions are stable between two calls of `refresh`, whatever writers add or remove meanwhile.
    Windows are held in memory, at most the spool's limit. Picklable: another process reads anew.

    Args:
      run_dir, name: the spool's.
      newest: at most so many windows, those of the highest blocks, so that rounds follow a stream
        that changes; None for all that the spool holds.

    Attributes:
      blocks, positions: `(N,)` int64, where each window was in the stream.
      keep_probability: `(N,)` float32 with which it was kept, NaN where that is not known.
      kept: `(N,)` int8, 1 kept, 0 dropped, -1 not known.
      sources: `(N,)` names of where the windows are from, "" where that is not known.
      lots: `(N,)` float64 in [0, 1), a hash of the window's content: the same window draws the same
        lot in every snapshot, so that what is held out stays held out.
      skipped_files: damaged files that were passed over so far.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        name: str = "default",
        *,
        newest: int | None = None,
    ):
        if newest is not None and (type(newest) is not int or newest < 1):
            raise ConfigError(f"newest={newest!r}; expected a number of windows >= 1, or None.")
        self._arguments, self._newest = (run_dir, name), newest
        self._store, self._folder = open_store(run_dir), _folder(name)
        self._parts: dict[str, dict[str, np.ndarray]] = {}
        self._damaged: set[str] = set()
        self._warned = False
        self.skipped_files = 0
        self.refresh()

    def __reduce__(self):
        return functools.partial(SpooledWindows, newest=self._newest), self._arguments

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._windows[index]

    def take(self, index: np.ndarray) -> np.ndarray:
        """Windows at `(n,)` positions: `(n, T)` int32 or `(n, T, C)` float32."""
        return np.ascontiguousarray(self._windows[index])

    def describe(self) -> str:
        """The place of the spool, for messages."""
        return str(self._store.describe(self._folder))

    def refresh(self) -> int:
        """Reads files that came, forgets those that went; returns how many windows there are now.

        A damaged file is skipped with one warning and counted; windows of another shape than the
        newest ones are left out. Raises `OSError` when the folder cannot be listed.
        """
        names = sorted(n for n in self._store.names(self._folder) if _NAME.fullmatch(n))
        self._parts = {name: part for name, part in self._parts.items() if name in names}
        for name in names:
            if name not in self._parts and name not in self._damaged:
                part = self._read(name)
                if part is not None:
                    self._parts[name] = part
        parts = [self._parts[name] for name in sorted(self._parts)]
        if parts:
            newest = parts[-1]["windows"]
            parts = [p for p in parts if p["windows"].shape[1:] == newest.shape[1:]]
        joined = {
            name: np.concatenate([part[name] for part in parts])
            if parts
            else np.empty((0, *_WIDTHS.get(name, ())), dtype)
            for name, dtype in _TENSORS.items()
        }
        # A block that was read again left the same windows again. Content counts too: hosts that
        # number blocks for themselves meet at the same places with other windows.
        sums = np.array([zlib.crc32(window.tobytes()) for window in joined["windows"]], np.int64)
        places = np.stack([joined["blocks"], joined["positions"], sums], axis=1)
        first = np.sort(np.unique(places, axis=0, return_index=True)[1])
        if self._newest is not None and len(first) > self._newest:
            by_block = np.argsort(joined["blocks"][first], kind="stable")
            first = np.sort(first[by_block[-self._newest :]])
        self.lots = sums[first] / 2.0**32
        self._windows = joined["windows"][first]
        self.blocks, self.positions = joined["blocks"][first], joined["positions"][first]
        self.keep_probability, self.kept = joined["keep_probability"][first], joined["kept"][first]
        self.sources = _decoded(joined["source"][first])
        return len(self)

    def _read(self, name: str) -> dict[str, np.ndarray] | None:
        match = _NAME.fullmatch(name)
        assert match is not None
        try:
            data = self._store.read(f"{self._folder}/{name}", min(int(match[2]), _MAX_FILE_BYTES))
            if len(data) != int(match[2]) or zlib.crc32(data) != int(match[3], 16):
                raise ValueError("its bytes are not those that were written")
            part = safetensors.numpy.load(data)
            part.setdefault("source", _encoded([], len(part.get("blocks", ()))))
            wrong = _misfit(part)
            if wrong:
                raise ValueError(wrong)
            return part
        except FileNotFoundError:
            return None  # removed by a writer since it was listed
        except (OSError, ValueError, SafetensorError) as error:
            self._damaged.add(name)
            self.skipped_files += 1
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"Skipping {name} in {self._store.describe(self._folder)}: {error}; "
                    "calibration goes on with the other files.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return None


_TENSORS = {
    "windows": np.int32,
    "blocks": np.int64,
    "positions": np.int64,
    "keep_probability": np.float32,
    "kept": np.int8,
    "source": np.uint8,
}
_WIDTHS = {"source": (64,)}  # beyond the first axis; a name is UTF-8 bytes, filled up with zeros


def _misfit(part: dict[str, np.ndarray]) -> str:
    """Says how tensors of a file are not those of a spool; "" where they are."""
    if part.keys() != _TENSORS.keys():
        return f"it holds {sorted(part)}, expected {sorted(_TENSORS)}"
    windows = part["windows"]
    if (windows.ndim, windows.dtype) not in ((2, np.int32), (3, np.float32)):
        return f"its windows are {windows.dtype}{windows.shape}"
    for name, dtype in _TENSORS.items():
        shape = (*windows.shape[:1], *_WIDTHS.get(name, ()))
        if name != "windows" and (part[name].dtype, part[name].shape) != (dtype, shape):
            return f"its {name} are {part[name].dtype}{part[name].shape}"
    return ""


def _encoded(names: Sequence[str], count: int) -> np.ndarray:
    """`(count, 64)` uint8; rows without a name are zeros."""
    rows = np.zeros((count, *_WIDTHS["source"]), np.uint8)
    for row, name in zip(rows, names):
        data = name.encode(errors="replace")[: len(row)]
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return rows


def _decoded(rows: np.ndarray) -> np.ndarray:
    """`(N,)` names; one that was cut within a character loses that character."""
    texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]
    return np.array(texts, dtype=str)


def _folder(name: str) -> str:
    check_key(name)
    if "/" in name:
        raise ConfigError(f"name={name!r}; expected one file name without '/'.")
    return f"{FOLDER}/{name}"


def _spool(run_dir, name, share, limit_bytes, seed, file_bytes, clock) -> Spool:
    return Spool(
        run_dir,
        name,
        share=share,
        limit_bytes=limit_bytes,
        seed=seed,
        file_bytes=file_bytes,
        clock=clock,
    )


def _flush(reference: weakref.ref[Spool]) -> None:
    spool = reference()
    if spool is not None:
        spool.flush()
