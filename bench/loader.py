"""What the filter costs inside a grain pipeline, and whether its memory grows.

python -m bench.loader            measure, store bench/records/loader.json, write the README's table
python -m bench.loader --speed    that part alone; --memory and --worker the others
python -m bench.loader --table    write the table from the stored record

The pipeline: a memory-mapped file of 256-token windows -> shuffle -> filter (a quarter is kept) ->
batch of 32 -> iterator, in this process or in two worker processes; over a `MapDataset` (map), with
grain's default read threads, and over an `IterDataset` (iter), read in one thread as a stream is.
In the filter's place, taking turns:

- `metagrad`: `score_filter` with a published scorer (`linear`, int8);
- `uniform`: `score_filter` before the first version, a seeded uniform choice from the same blocks;
- `grain filter`: grain's own `filter` with a seeded coin per window, the simplest there is;
- `none`: nothing is filtered.

`kept per second` of the first three are compared with each other, `read per second` with `none`:
source windows read, whether kept or not. A figure is the best of its turns; all are in the record.

Memory is that of the process after one and after ten million windows of 64 tokens, with a new
version published every 250,000, read in process over an `IterDataset`.

The worker is calibration beside the loader, see `loader_worker.py`; about three minutes.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

import metagrad_filter as mgf
from bench.loader_worker import measure_worker, sentences
from bench.readme import README, replaced
from bench.record import write_record
from bench.throughput import VOCAB, environment, random_scorer, windows_of

RECORD = Path(__file__).parent / "records" / "loader.json"
WINDOWS, LENGTH, BATCH, RATIO = 65_536, 256, 32, 0.25
ROUNDS, SECONDS = 5, 1.5
FILTERS = ("metagrad", "uniform", "grain filter", "none")
MANY, LATER, SHORT = 1_000_000, 10_000_000, 64
PUBLISH_EVERY = 250_000
PARTS = ("speed", "memory", "worker")

_WARM = 20  # batches


class Windows:
    """A file of windows as a random-access source; opened again in every process."""

    def __init__(self, path: str):
        self._path = path
        self._array: np.ndarray | None = None

    def __len__(self) -> int:
        return WINDOWS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        array = self._array
        if array is None:
            array = self._array = np.load(self._path, mmap_mode="r")
        return {"tokens": np.array(array[index])}

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_array": None}


class Coin:
    """Keeps a window by a coin that hashes its first two tokens."""

    def __call__(self, element: dict[str, np.ndarray]) -> bool:
        first, second = element["tokens"][:2].tolist()
        return (first * 0x9E3779B1 + second * 0x85EBCA77 + 0x2545F491) % 2**32 < RATIO * 2**32


def pipeline(kind: str, path: str, folder: str, home: str, workers: int) -> grain.IterDataset:
    """Returns a pipeline that ends in batches, for ever."""
    ds: Any = grain.MapDataset.source(Windows(path)).shuffle(seed=0).repeat()
    if home == "iter":
        # As a streaming source is read: in order, in one thread.
        ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if kind == "grain filter":
        ds = ds.filter(Coin())
    elif kind != "none":
        ds = mgf.score_filter(
            ds,
            f"{folder}/{kind}",
            keep_ratio=RATIO,
            windows=mgf.TextWindows("tokens"),
            name=f"{home}-{workers}",
        )
    if home == "map" and kind == "grain filter":
        ds = ds.to_iter_dataset().batch(BATCH)  # a sparse MapDataset cannot be batched
    elif home == "map":
        ds = ds.batch(BATCH).to_iter_dataset()
    else:
        ds = ds.batch(BATCH)
    return ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else ds


def measure(parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Measures the named parts, and takes the others from the stored record; JSON types only."""
    # grain's workers read absl flags, which nobody parses outside absl.app.
    flags.FLAGS.mark_as_parsed()
    record: dict[str, Any] = {
        "config": {
            "windows": WINDOWS,
            "tokens": LENGTH,
            "batch": BATCH,
            "keep_ratio": RATIO,
            "rounds": ROUNDS,
            "seconds_a_turn": SECONDS,
        },
        "environment": environment(),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in parts:
            path = f"{folder}/windows.npy"
            np.save(path, windows_of("zipf", LENGTH, WINDOWS))
            mgf.Registry(f"{folder}/metagrad").publish(random_scorer("linear", "int8"))
            found["speed"] = [
                row
                for home in ("map", "iter")
                for workers in (0, 2)
                for row in _speed(path, folder, home, workers)
            ]
        if "memory" in parts:
            found["memory"] = _memory(f"{folder}/memory")
    if "worker" in parts:
        # Last, for it pins this process to one core.
        found["worker"] = measure_worker()
    # Read late, for the other part may have been measured meanwhile.
    stored = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record = {"speed": [], "memory": None, "worker": None, **stored, **record, **found}
    write_record(RECORD, record)
    return record


def _speed(path: str, folder: str, home: str, workers: int) -> list[dict[str, Any]]:
    iterators = {kind: iter(pipeline(kind, path, folder, home, workers)) for kind in FILTERS}
    for iterator in iterators.values():
        for _ in range(_WARM):  # workers start, files are read into the page cache
            next(iterator)
    turns: dict[str, list[float]] = {kind: [] for kind in FILTERS}
    for _ in range(ROUNDS):
        for kind, iterator in iterators.items():
            if workers:
                time.sleep(0.5)  # the other pipelines' workers fill their queues and rest
            # What was prefetched while others ran does not count.
            for _ in range(_WARM):
                next(iterator)
            batches, began = 0, time.perf_counter()
            while time.perf_counter() - began < SECONDS:
                next(iterator)
                batches += 1
            turns[kind].append(batches * BATCH / (time.perf_counter() - began))
    for iterator in iterators.values():
        iterator.close()
    rows = []
    for kind, values in turns.items():
        share = 1.0 if kind == "none" else RATIO
        rows.append(
            {
                "home": home,
                "workers": workers,
                "filter": kind,
                "kept_per_second": max(values),
                "read_per_second": max(values) / share,
                "median_kept_per_second": statistics.median(values),
                "turns": values,
            }
        )
        print(f"{home} {workers} {kind}: {max(values):.0f}", file=sys.stderr)
    return rows


class Short:
    """Endless short windows, made of one block of random ids."""

    def __init__(self):
        self._windows = np.random.default_rng(0).integers(0, VOCAB, (4096, SHORT), np.int32)

    def __len__(self) -> int:
        return LATER + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._windows[index % 4096]}


def _memory(run_dir: str) -> dict[str, Any]:
    registry = mgf.Registry(run_dir)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ds = grain.MapDataset.source(Short()).to_iter_dataset(options)
    ds = mgf.score_filter(
        ds,
        run_dir,
        keep_ratio=RATIO,
        windows=mgf.TextWindows("tokens"),
        swap_every_blocks=128,
        name="memory",
    )
    at: dict[int, int] = {}
    versions, began = 0, time.perf_counter()
    for kept, _ in enumerate(ds, 1):
        seen = int(kept / RATIO)
        if seen >= versions * PUBLISH_EVERY:
            versions += 1
            registry.publish(random_scorer("linear", "int8"))
        for mark in (MANY, LATER):
            if mark not in at and seen >= mark:
                gc.collect()
                at[mark] = _resident()
    return {
        "windows": [MANY, LATER],
        "tokens": SHORT,
        "resident_bytes": [at[MANY], at[LATER]],
        "growth_mib": (at[LATER] - at[MANY]) / 2**20,
        "versions": versions,
        "windows_per_second": LATER / (time.perf_counter() - began),
    }


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def ratios(record: dict[str, Any]) -> list[dict[str, Any]]:
    """For each home and number of workers, `metagrad` over the other filters."""
    by = {(row["home"], row["workers"], row["filter"]): row for row in record["speed"]}
    rows = []
    for home, workers in dict.fromkeys((key[0], key[1]) for key in by):
        mine = by[home, workers, "metagrad"]
        rows.append(
            {
                "home": home,
                "workers": workers,
                "read_per_second": mine["read_per_second"],
                "uniform": mine["kept_per_second"]
                / by[home, workers, "uniform"]["kept_per_second"],
                "grain filter": mine["kept_per_second"]
                / by[home, workers, "grain filter"]["kept_per_second"],
                "none": mine["read_per_second"] / by[home, workers, "none"]["read_per_second"],
            }
        )
    return rows


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = [
        "| dataset | workers | windows read/s | / uniform | / grain's filter | / no filter |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in ratios(record):
        lines.append(
            f"| {row['home']} | {row['workers']} | {row['read_per_second']:.0f} | "
            f"{row['uniform']:.2f} | {row['grain filter']:.2f} | {row['none']:.2f} |"
        )
    memory = record["memory"]
    if memory:
        lines.append("")
        lines.append(
            f"Resident memory grew by {memory['growth_mib']:.1f} MiB from {MANY:,} to {LATER:,} "
            f"windows, over {memory['versions']} versions."
        )
    if record.get("worker"):
        lines += ["", *sentences(record["worker"])]
    return "\n".join(lines)


def main() -> None:
    parts = [part for part in PARTS if f"--{part}" in sys.argv]
    if "--table" in sys.argv:
        record = json.loads(RECORD.read_text())
    else:
        record = measure(parts or PARTS)
    README.write_text(replaced(README.read_text(), "loader-table", table(record)))
    print(table(record))


if __name__ == "__main__":
    main()
