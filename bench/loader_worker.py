"""Whether a calibrator at full load, on a core of its own, slows the loader down.

python -m bench.loader --worker    measure, add to bench/records/loader.json, write the README

The loader is pinned to one core, `metagrad-filter calibrate --watch` runs rounds without a pause on
another, and both use one run directory, so versions that it publishes are taken up while it is
measured. Turns alternate between the worker running and the worker stopped (SIGSTOP); a ratio is
that of the best turns of each kind, and the median over pairs of neighbours stands beside it. The
worker's share of its core during the turns is measured too: below 0.9 there was no full load.

Takes about three minutes on two cores that nothing else uses; with fewer than two it is refused.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import metagrad_filter as mgf

VOCAB, LENGTH, WINDOWS = 512, 256, 65_536
PAIRS, SECONDS = 16, 2.0
HOMES = ("map", "iter")
FULL_LOAD = 0.9

_RUN_DIR, _WINDOWS = "LOADER_WORKER_RUN_DIR", "LOADER_WORKER_WINDOWS"
_FIRST_ROUND_SECONDS = 400.0
_WARM = 40  # batches
_ROUND_TOKENS = 64


def calibrator() -> mgf.Calibrator:
    """Returns what the worker process runs: rounds of a decoder of a million parameters."""
    import jax.numpy as jnp
    import optax

    from metagrad_filter.metagradient.trajectory import run
    from metagrad_filter.proxy import DecoderConfig, DecoderLoss, Proxy, init_decoder

    windows = np.load(os.environ[_WINDOWS], mmap_mode="r")[:8192, :_ROUND_TOKENS]
    windows = np.ascontiguousarray(windows)
    config = DecoderConfig(
        vocab_size=VOCAB,
        n_positions=_ROUND_TOKENS,
        n_embd=256,
        n_layer=1,
        n_head=4,
        activation_function="relu2",
        initializer_range=0.06,
    )
    loss, factory = DecoderLoss(config), functools.partial(optax.adamw, b2=0.95)
    params, optimizer = init_decoder(config, seed=0), factory(1e-3)
    batches = windows[:128].reshape(8, 16, -1)
    params, state, _ = run(
        loss, optimizer, params, optimizer.init(params), batches, jnp.ones((8, 16))
    )
    return mgf.Calibrator(
        os.environ[_RUN_DIR],
        proxy=Proxy(loss, params, state, factory, 1e-3),
        target=mgf.HeldOutLoss(windows[-64:]),
        windows=windows[:-64],
        config=mgf.CalibrationConfig(
            horizon=8,
            trajectories=2,
            batch_windows=16,
            labels=1024,
            learning_rate_scale=0.25,
            minimum_reliability=-0.9,
            gate_steps=4,
            gate_pairs=4,
            gate_margin=0.0,  # versions are to come and go
            vocab_size=VOCAB,
        ),
    )


def measure_worker() -> dict[str, Any]:
    """Measures loader throughput beside a worker and without it; JSON types only."""
    # The loader's pipeline is that of the other rows.
    from bench.loader import BATCH, RATIO, pipeline
    from bench.throughput import random_scorer

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("The worker needs a core of its own; this process may use one only.")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/windows.npy"
        rng = np.random.default_rng(7)
        zipf = 1 / (np.arange(VOCAB) + 2.7)
        np.save(path, rng.choice(VOCAB, (WINDOWS, LENGTH), p=zipf / zipf.sum()).astype(np.int32))
        registry = mgf.Registry(f"{folder}/metagrad")
        registry.publish(random_scorer("linear", "int8"))  # scores from the first block on
        with _worker(Path(folder), path, cores[1]) as process:
            _pin(cores[0])
            rows = []
            for home in HOMES:
                iterator = iter(pipeline("metagrad", path, folder, home, 0))
                for _ in range(_WARM):
                    next(iterator)
                rows.append(_alternate(process, iterator, BATCH) | {"home": home})
                iterator.close()
                del iterator
                gc.collect()  # what it has yet to write belongs into the folder
                print(f"{home}: {rows[-1]['ratio']:.4f}", file=sys.stderr)
        reports = len(list(Path(folder, "metagrad", "rounds").glob("round-*.json")))
        versions = len(registry.versions())
    return {
        "rows": rows,
        "keep_ratio": RATIO,
        "windows": WINDOWS,
        "tokens": LENGTH,
        "seconds_a_turn": SECONDS,
        "rounds": reports,
        "versions": versions,
    }


@contextmanager
def _worker(folder: Path, windows: str, core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that calibrates on one core, from the end of its first round on."""
    run_dir = folder / "metagrad"
    settings = folder / "calibrate.toml"
    settings.write_text(
        f'run_dir = "{run_dir}"\nsetup = "bench.loader_worker:calibrator"\n'
        "[worker]\nniceness = 0\nthreads = 1\ndevice = 'cpu'\n"
    )
    environment = os.environ | {_RUN_DIR: str(run_dir), _WINDOWS: windows}
    command = ["-m", "metagrad_filter.cli", "calibrate", str(settings), "--watch"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=Path(__file__).parent.parent,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        stdout=sys.stderr,
    )
    try:
        end = time.monotonic() + _FIRST_ROUND_SECONDS
        while not (run_dir / "rounds" / "round-000001.json").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("The worker reported no round; its output says why.")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(60)


def _alternate(process: subprocess.Popen[bytes], iterator: Any, batch: int) -> dict[str, Any]:
    turns: dict[str, list[float]] = {"beside": [], "alone": []}
    shares: list[float] = []
    for pair in range(PAIRS):
        # Which of the two comes first alternates too, or a drift of the machine would count.
        for kind in ("beside", "alone")[:: 1 if pair % 2 else -1]:
            process.send_signal(signal.SIGCONT if kind == "beside" else signal.SIGSTOP)
            for _ in range(_WARM):
                next(iterator)
            batches, used, began = 0, _processor_seconds(process.pid), time.perf_counter()
            while (elapsed := time.perf_counter() - began) < SECONDS:
                next(iterator)
                batches += 1
            turns[kind].append(batches * batch / elapsed)
            if kind == "beside":
                shares.append((_processor_seconds(process.pid) - used) / elapsed)
    if process.poll() is not None:
        raise SystemExit("The worker ended while it was measured; its output says why.")
    pairs = [beside / alone for beside, alone in zip(turns["beside"], turns["alone"], strict=True)]
    return {
        "ratio": max(turns["beside"]) / max(turns["alone"]),
        "median_ratio": statistics.median(pairs),
        "kept_per_second": max(turns["beside"]),
        "kept_per_second_alone": max(turns["alone"]),
        "worker_core_share": statistics.median(shares),
        "turns": turns,
    }


def _pin(core: int) -> None:
    """Pins every thread of this process; those that start later inherit it."""
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), {core})


def _processor_seconds(pid: int) -> float:
    # After the name, which may hold anything: state is field 3, user and system time 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sentences(found: dict[str, Any]) -> list[str]:
    """The record as lines for the README."""
    lines = []
    for row in found["rows"]:
        load = row["worker_core_share"]
        doubt = "" if load >= FULL_LOAD else ", which is no full load"
        lines.append(
            f"Beside a calibration worker on a core of its own ({load:.0%} of it used{doubt}), the "
            f"{row['home']} dataset is read at {row['ratio']:.3f} of the speed without it (median "
            f"over pairs of turns {row['median_ratio']:.3f})."
        )
    return lines
