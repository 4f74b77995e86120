"""A stream from a store that memory does not hold: windows a second and resident memory.

python -m bench.series_store                 10 GB, bench/records/series_store.json
python -m bench.series_store --gigabytes 1   a smaller one; nothing is recorded without --record

Writes 8 synthetic series x 8 channels float32 as Zarr (Blosc, chunks of 2 MiB) under a temporary
folder, chunk by chunk, fits a series scorer on some windows of the same kind, and streams all
windows of 256 steps through `WindowStream` and `score_filter` in a process of its own, which loads
the published scorer like any loader. Of each window it is known what it is: usual, a rare
oscillation, or a broken sensor; the record says how many of each were kept at a ratio of 0.25.

Readings are multiples of 1/64, as sensors with a fixed resolution give them, so the store takes
less disk than its 10 GB; it is read from the page cache where that is large enough. Resident memory
is the process's own peak (VmHWM). Where other work runs beside it, `load_average` in the record
says so, and processor seconds are the figure to read. Cost: some four minutes on two free cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "series_store.json"

SERIES, CHANNELS, LENGTH = 8, 8, 256
CHUNK_WINDOWS = 256
CHUNK_ROWS = CHUNK_WINDOWS * LENGTH
POOL = 4096
KINDS = ("usual", "rare", "broken")
SHARES = (0.85, 0.05, 0.10)
WORTH = (0.0, 1.0, -1.0)
KEEP_RATIO = 0.25
ADAPTER_ONLY_WINDOWS = 50_000


def pool(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`(POOL, LENGTH, CHANNELS)` float32 windows and the position of each one's kind in `KINDS`."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(KINDS), POOL, p=SHARES)
    steps = np.arange(LENGTH)[None, :, None]
    period = rng.uniform(30, 120, (POOL, 1, CHANNELS))
    phase = rng.uniform(0, 2 * np.pi, (POOL, 1, CHANNELS))
    windows = 2 * np.sin(2 * np.pi * steps / period + phase)
    windows += 0.3 * rng.normal(size=windows.shape)
    burst = 2.5 * np.sin(1.3 * np.arange(48)) * np.hanning(48)
    for i in np.flatnonzero(kinds):
        channel, start = rng.integers(CHANNELS), rng.integers(LENGTH - 48)
        if kinds[i] == 1:
            windows[i, start : start + 48, :2] += burst[:, None]
        elif rng.random() < 0.5:
            windows[i, start:, channel] = windows[i, start, channel]
        else:
            windows[i, rng.random(LENGTH) < 0.05, channel] = 12.0
    windows = (np.round(windows * 64) / 64).astype(np.float32)
    windows[rng.random(windows.shape) < 0.005] = np.nan
    return windows, kinds


def drawn(series: int, chunk: int) -> np.ndarray:
    """Which windows of the pool a chunk holds, `(CHUNK_WINDOWS,)`."""
    return np.random.default_rng((1, series, chunk)).integers(0, POOL, CHUNK_WINDOWS)


def write_store(folder: Path, chunks: int) -> None:
    """Writes `chunks` chunks of every series, a few at a time."""
    ts = importlib.import_module("tensorstore")
    windows, _ = pool()
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "chunks": [1, CHUNK_ROWS, CHANNELS],
                "compressor": {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1},
            },
        },
        create=True,
        dtype=np.float32,
        shape=(SERIES, chunks * CHUNK_ROWS, CHANNELS),
    ).result()
    pending: list[Any] = []
    for series in range(SERIES):
        for chunk in range(chunks):
            rows = windows[drawn(series, chunk)].reshape(CHUNK_ROWS, CHANNELS)
            first = chunk * CHUNK_ROWS
            pending.append(store[series, first : first + CHUNK_ROWS].write(rows))
            if len(pending) > 4:
                pending.pop(0).result()
    for future in pending:
        future.result()


def publish(run: Path) -> None:
    """Fits a scorer on noisy labels of other windows of the same kind and publishes it."""
    import metagrad_filter as mgf
    from metagrad_filter.scorer.fit_series import fit_series

    windows, kinds = pool(seed=2)
    noise = np.random.default_rng(3).normal(size=POOL)
    labels = np.array(WORTH)[kinds] + 0.3 * noise
    mgf.Registry(run).publish(fit_series(windows, labels, deeper=False))


def stream(store: Path, run: Path) -> dict[str, Any]:
    """Reads the whole store through the filter; runs in a process of its own."""
    import metagrad_filter as mgf

    adapter = importlib.import_module("metagrad_filter.adapters.timeseries")
    imported = resident()
    cut = adapter.Cut(length=LENGTH)
    problems = adapter.Problems()
    series = adapter.open_store(store)
    began, used = time.perf_counter(), time.process_time()
    count = 0
    for _ in zip(range(ADAPTER_ONLY_WINDOWS), adapter.WindowStream(series, cut)):
        count += 1
    alone = count / (time.perf_counter() - began)
    alone_cpu = (time.process_time() - used) / count
    before = resident()

    ds: Any = adapter.WindowStream(series, cut, problems=problems)
    ds = mgf.score_filter(ds, run, keep_ratio=KEEP_RATIO, windows=adapter.WINDOWS)
    ds = ds.batch(64, drop_remainder=False)
    kept: list[np.ndarray] = []
    began, used = time.perf_counter(), time.process_time()
    for batch in ds:
        kept.append(np.stack([batch["series"].astype(np.int64), batch["start"]], axis=1))
    seconds, used = time.perf_counter() - began, time.process_time() - used
    counters = mgf.counters("default")
    return {
        "windows": counters.windows_seen,
        "kept": counters.windows_kept,
        "seconds": round(seconds, 1),
        "windows_per_second": round(counters.windows_seen / seconds),
        "cpu_us_per_window": round(1e6 * used / counters.windows_seen, 1),
        "windows_per_cpu_second": round(counters.windows_seen / used),
        "non_finite_scores": counters.non_finite_scores,
        "adapter_alone": {
            "windows_per_second": round(alone),
            "cpu_us_per_window": round(1e6 * alone_cpu, 1),
        },
        "resident_mib_after_imports": imported,
        "resident_mib_before_filter": before,
        "resident_mib_peak": resident(),
        "problems": problems.counts(),
        "kept_of": _kept_of(np.concatenate(kept), series),
    }


def resident() -> int:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def _kept_of(kept: np.ndarray, series: list[Any]) -> dict[str, float]:
    """Share of the windows of each kind that was kept."""
    _, kinds = pool()
    chunks = len(series[0]) // CHUNK_ROWS
    total: Counter[int] = Counter()
    found: Counter[int] = Counter()
    for number in range(SERIES):
        starts = kept[kept[:, 0] == number, 1]
        for chunk in range(chunks):
            mine = kinds[drawn(number, chunk)]
            total.update(mine.tolist())
            inside = starts[starts // CHUNK_ROWS == chunk] % CHUNK_ROWS // LENGTH
            found.update(mine[inside].tolist())
    return {name: round(found[i] / total[i], 4) for i, name in enumerate(KINDS) if total[i]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the store is written")
    parser.add_argument("--record", action="store_true", help="record a store of any size")
    parser.add_argument("--stream", nargs=2, type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(stream(*options.stream)))
        return
    chunk_bytes = CHUNK_ROWS * CHANNELS * 4
    chunks = math.ceil(options.gigabytes * 1e9 / (SERIES * chunk_bytes))
    size = SERIES * chunks * chunk_bytes
    with tempfile.TemporaryDirectory(prefix="series-store-", dir=options.folder) as temporary:
        free = shutil.disk_usage(temporary).free
        if free < 1.2 * size:
            sys.exit(
                f"{temporary} has {free / 1e9:.1f} GB free, {1.2 * size / 1e9:.1f} are needed."
            )
        store, run = Path(temporary) / "store.zarr", Path(temporary) / "run"
        say(f"Writing {size / 1e9:.1f} GB to {store}")
        began = time.perf_counter()
        write_store(store, chunks)
        writing = time.perf_counter() - began
        disk = sum(file.stat().st_size for file in store.iterdir())
        say(f"Written in {writing:.0f} s, {disk / 1e9:.1f} GB on disk; fitting a scorer")
        publish(run)
        say("Streaming")
        command = [sys.executable, "-m", "bench.series_store", "--stream", str(store), str(run)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    record = {
        "store": {
            "gigabytes": round(size / 1e9, 2),
            "gigabytes_on_disk": round(disk / 1e9, 2),
            "shape": [SERIES, chunks * CHUNK_ROWS, CHANNELS],
            "chunk_mib": chunk_bytes / 2**20,
            "seconds_to_write": round(writing, 1),
        },
        "window": [LENGTH, CHANNELS],
        "keep_ratio": KEEP_RATIO,
        **found,
        "environment": environment("numpy", "grain", "tensorstore"),
    }
    say(json.dumps(found))
    if options.gigabytes >= 10 or options.record:
        write_record(RECORD, record)
        say(f"Recorded in {RECORD.name}")


if __name__ == "__main__":
    main()
