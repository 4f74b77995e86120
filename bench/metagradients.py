"""Metagradients against autodiff through the loop and against plain training: time and memory.

python -m bench.metagradients            run all parts, store, rewrite the README's tables
python -m bench.metagradients --ratios   only the part that runs (about ten minutes, two idle cores)
python -m bench.metagradients --sizes    only the part that compiles GPT-2 (about as long)
python -m bench.metagradients --long     only GPT-2 at 32,768 tokens, compiled (several minutes)
python -m bench.metagradients --table    only rewrite the README's tables from the stored record

Ratios, in one run: the same decoder (2 layers, 64 wide, vocabulary 1,024, squared ReLU or GELU),
AdamW from warm moments, T steps of k windows of L tokens and an outer metric of 64 windows.

* (a) `jax.grad` through `lax.scan` over steps under `jax.checkpoint`, the usual way;
* (b) the same without `jax.checkpoint`;
* (c) the same T steps of plain training, which yield no metagradient;
* ours: `metagradients(tape="auto", microbatch=8)`, and with tape="segments".

Contenders take turns, and a ratio is the median over turns. Memory is what the compiled programs
take on this backend: arguments, results and temporaries (`predict_memory` for ours). Ours computes
the probe and the end of the trajectory as well, the others the scores alone.

Sizes: GPT-2 124M (random weights: sizes are what counts), compiled and not run. Predicted on the
CPU backend, whose compiler fuses differently from a GPU's; the GPU's rows are empty where none was
at hand. k=64 windows of L tokens, microbatches of 4 (L=128) or 1 (L=1024), blocks recomputed
(`remat`), float32. Published for comparison: 52.07 GB and 3.24 s at k=64, L=128, T=16 on an H100,
and out of memory at T=32 or L=256 (scan and checkpoint, float32).

Long: the same for one window of 32,768 tokens and T=2 in bfloat16, moments and parameters on the
device, with attention in linear memory ("chunked") and with the whole softmax ("xla"). Kernels for
GPUs hold q, k, v, o and statistics, as "chunked" does beside its tiles.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagrad_filter as mgf
from bench.readme import README, RECORDS, replaced
from bench.record import write_record
from metagrad_filter.metagradient.adjoint import Metagradients
from metagrad_filter.metagradient.memory import predict_memory, program_bytes
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder
from metagrad_filter.targets import mean_loss

RECORD = RECORDS / "metagradients.json"
VOCAB, WIDTH, LAYERS, HEADS = 1024, 64, 2, 4
OUTER_WINDOWS, MICROBATCH, TURNS = 64, 8, 3
# activation, k windows, L tokens, T steps
SHAPES = (
    ("relu2", 64, 64, 16),
    ("gelu_new", 64, 64, 16),
    ("relu2", 16, 64, 16),
    ("relu2", 64, 64, 4),
    ("relu2", 16, 128, 32),
)
HORIZONS = (96, 256)
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
# windows, tokens, steps, levels, offload
SIZES = (
    (64, 128, 16, None, True),
    (64, 1024, 16, None, True),
    (64, 128, 64, None, True),
    (64, 128, 96, 1, False),
    (64, 128, 96, None, True),
    (64, 128, 256, 2, False),
    (64, 128, 256, None, True),
)
LONG = {"windows": 1, "tokens": 32_768, "steps": 2, "dtype": "bfloat16"}
# What attention is computed by, and its name in the README.
ATTENTION = {"chunked": "linear memory", "xla": "whole softmax"}


def gpt2(tokens: int, **fields: Any) -> DecoderConfig:
    """GPT-2 124M with blocks recomputed, and positions for windows of `tokens` inputs."""
    shape = GPT2 | {"n_positions": max(GPT2["n_positions"], tokens)}
    return DecoderConfig(**shape, remat=True, **fields)


class World:
    """A decoder with warm moments, batches, and an outer metric."""

    def __init__(self, activation: str, windows: int, tokens: int, steps: int):
        config = DecoderConfig(
            vocab_size=VOCAB,
            n_positions=tokens,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            activation_function=activation,
        )
        self.loss = DecoderLoss(config)
        self.optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=0.01)
        rng = np.random.default_rng(0)

        def draw(*lead: int) -> jax.Array:
            # Zipfian, so that rare rows of the embedding see no gradient, as in text.
            ids = rng.zipf(1.2, (*lead, tokens + 1)) % VOCAB
            return jnp.asarray(ids, jnp.int32)

        self.batches, warm, held_out = draw(steps, windows), draw(8, windows), draw(OUTER_WINDOWS)
        self.weights = jnp.ones((steps, windows), jnp.float32)
        self.outer = mean_loss(self.loss, np.asarray(held_out), MICROBATCH)
        params = init_decoder(config, seed=0)
        state = (params, self.optimizer.init(params))
        self.state: tuple[Any, Any] = jax.jit(self.trained)(
            *state, warm, jnp.ones((8, windows), jnp.float32)
        )

    def trained(self, params, opt_state, batches, weights, remat: bool = False):
        def step(state, inputs):
            params, opt_state = state
            batch, w = inputs
            gradient = jax.grad(lambda p: jnp.sum(w * self.loss(p, batch)) / w.shape[0])(params)
            updates, opt_state = self.optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        body: Any = jax.checkpoint(step) if remat else step
        return jax.lax.scan(body, (params, opt_state), (batches, weights))[0]

    def autodiff(self, remat: bool):
        def phi(weights, params, opt_state, batches):
            return self.outer(self.trained(params, opt_state, batches, weights, remat)[0])

        return jax.jit(jax.grad(phi)).lower(self.weights, *self.state, self.batches)

    def plain(self):
        return jax.jit(self.trained).lower(*self.state, self.batches, self.weights)

    def ours(self, **options: Any) -> Metagradients:
        return mgf.metagradients(
            self.loss, self.outer, *self.state, self.batches, optimizer=self.optimizer, **options
        )

    def predicted(self, **options: Any) -> int:
        return predict_memory(
            self.loss, self.outer, *self.state, self.batches, optimizer=self.optimizer, **options
        ).peak_bytes


OURS = {
    "ours": {"microbatch": MICROBATCH},
    "ours, segments": {"microbatch": MICROBATCH, "tape": "segments"},
}


def measure(activation: str, windows: int, tokens: int, steps: int, progress) -> dict[str, Any]:
    """One row of ratios."""
    world = World(activation, windows, tokens, steps)
    with_b = (windows, tokens, steps) == (64, 64, 16)
    compiled = {
        "(a) checkpoint": world.autodiff(True).compile(),
        "(c) plain": world.plain().compile(),
    }
    if with_b:
        compiled["(b) no checkpoint"] = world.autodiff(False).compile()
    memory = {name: program_bytes(program) for name, program in compiled.items()}
    calls = {
        "(a) checkpoint": lambda p: p(world.weights, *world.state, world.batches),
        "(b) no checkpoint": lambda p: p(world.weights, *world.state, world.batches),
        "(c) plain": lambda p: p(*world.state, world.batches, world.weights),
    }
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(calls[name], program) for name, program in compiled.items()
    }
    tapes, scores = {}, {}
    for name, options in OURS.items():
        memory[name] = world.predicted(**options)
        runs[name] = functools.partial(world.ours, **options)
        result = world.ours(**options)
        tapes[name], scores[name] = str(result.tape), np.asarray(result.scores)
    expected = -np.asarray(runs["(a) checkpoint"]())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(_arrays(run()))
            seconds[name].append(time.perf_counter() - start)
    progress(f"{activation} k={windows} L={tokens} T={steps}")

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other]))

    row: dict[str, Any] = {
        "activation": activation,
        "windows": windows,
        "tokens": tokens,
        "steps": steps,
        "parameters": sum(x.size for x in jax.tree.leaves(world.state[0])),
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "bytes": memory,
        "tapes": tapes,
        "relative_error": {
            name: float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            for name, found in scores.items()
        },
        "time_ratio": {n: {c: ratio(n, c) for c in compiled} for n in OURS},
        "memory_ratio": {n: {c: memory[n] / memory[c] for c in compiled} for n in OURS},
    }
    return row


def linearity(progress) -> dict[str, Any]:
    """Seconds per step at long horizons, segments on one level, taking turns."""
    worlds = {steps: World("relu2", 16, 64, steps) for steps in HORIZONS}
    options = {"microbatch": MICROBATCH, "tape": "segments", "levels": 1}
    tapes = {steps: str(world.ours(**options).tape) for steps, world in worlds.items()}
    seconds: dict[int, list[float]] = {steps: [] for steps in HORIZONS}
    for _ in range(TURNS):
        for steps, world in worlds.items():
            start = time.perf_counter()
            jax.block_until_ready(world.ours(**options).scores)
            seconds[steps].append((time.perf_counter() - start) / steps)
    progress("linearity in T")
    short, long = HORIZONS
    return {
        "seconds_per_step": {str(steps): statistics.median(v) for steps, v in seconds.items()},
        "ratio": statistics.median(b / a for a, b in zip(seconds[short], seconds[long])),
        "tapes": {str(steps): tape for steps, tape in tapes.items()},
    }


def size(
    windows: int,
    tokens: int,
    steps: int,
    levels: int | None,
    offload: bool | None,
    **fields: Any,
) -> dict[str, Any]:
    """Predicted memory of GPT-2 124M at one shape; `fields` are those of its configuration."""
    config = gpt2(tokens, **fields)
    loss = DecoderLoss(config)
    optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=0.01)
    params = jax.eval_shape(lambda: init_decoder(config))
    opt_state = jax.eval_shape(optimizer.init, params)
    batches = jax.ShapeDtypeStruct((steps, windows, tokens + 1), jnp.int32)
    microbatch = 4 if tokens <= 128 else 1
    held_out = 128 if tokens <= GPT2["n_positions"] else 1
    outer = mean_loss(loss, np.zeros((held_out, tokens + 1), np.int32), microbatch)
    start = time.perf_counter()
    found = predict_memory(
        loss,
        outer,
        params,
        opt_state,
        batches,
        optimizer=optimizer,
        microbatch=microbatch,
        tape="segments",
        levels=levels,
        offload=offload,
    )
    return {
        "windows": windows,
        "tokens": tokens,
        "steps": steps,
        "dtype": config.dtype,
        "attention": config.attn_implementation or "chunked",
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "microbatch": microbatch,
        "tape": str(found.tape),
        "offload": offload,
        "predicted_bytes": found.peak_bytes,
        "predicted_host_bytes": found.host_bytes,
        "programs": found.programs,
        "compile_seconds": time.perf_counter() - start,
        "measured_gpu_bytes": None,
        "measured_gpu_seconds": None,
    }


def _arrays(result: Any) -> Any:
    if isinstance(result, jax.Array | tuple):
        return result
    return result.scores, result.probe, result.params


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "| activation | k | L | T | time / (a) | memory / (a) | memory / (b) | time / (c) "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["ratios"]:
        times, memories = row["time_ratio"]["ours"], row["memory_ratio"]["ours"]
        b = memories.get("(b) no checkpoint")
        lines.append(
            f"| {row['activation']} | {row['windows']} | {row['tokens']} | {row['steps']} "
            f"| {times['(a) checkpoint']:.2f} | {memories['(a) checkpoint']:.2f} "
            f"| {'' if b is None else f'{b:.3f}'} | {times['(c) plain']:.2f} "
            f"| {row['relative_error']['ours']:.0e} |"
        )
    if record.get("linearity"):
        short, long = record["linearity"]["seconds_per_step"]
        lines += [
            "",
            f"Seconds per step at T={long} over those at T={short}: "
            f"{record['linearity']['ratio']:.2f}",
        ]
    if sized := [*record["sizes"], *record["long"]]:
        lines += [
            "",
            "| GPT-2 124M: k | L | T | computed in | attention | tape | predicted GB | host GB "
            "| measured on a GPU |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in sized:
        measured = row["measured_gpu_bytes"]
        lines.append(
            f"| {row['windows']} | {row['tokens']} | {row['steps']} | {row['dtype']} "
            f"| {ATTENTION[row['attention']]} | {row['tape']} "
            f"| {row['predicted_bytes'] / 1e9:,.1f} | {row['predicted_host_bytes'] / 1e9:.1f} "
            f"| {'not measured' if measured is None else f'{measured / 1e9:.1f} GB'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or not set(arguments) <= {"--ratios", "--sizes", "--long", "--table"}:
        sys.exit(
            f"bench.metagradients: unknown arguments {arguments}; expected --ratios, --sizes, "
            "--long, --table or none"
        )
    record: dict[str, Any] = {"ratios": [], "linearity": None, "sizes": [], "long": []}
    if RECORD.exists():
        record |= json.loads(RECORD.read_text())

    def progress(line: str) -> None:
        print(line, flush=True)

    def store(**found: Any) -> None:
        record.update(found)
        record["environment"] = {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "flax", "optax")},
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
        }
        write_record(RECORD, record)

    if not arguments or "--ratios" in arguments:
        measured = []
        for shape in SHAPES:
            measured.append(measure(*shape, progress))
            store(ratios=measured)
        store(linearity=linearity(progress))
    if not arguments or "--sizes" in arguments:
        # The program of the outer metric is the same in most rows.
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
        rows = []
        for shape in SIZES:
            rows.append(size(*shape))
            progress(f"{rows[-1]['predicted_bytes'] / 1e9:.1f} GB: {shape}")
            store(sizes=rows)
    if not arguments or "--long" in arguments:
        rows = []
        for attention in ATTENTION:
            rows.append(size(**LONG, levels=None, offload=None, attn_implementation=attention))
            progress(f"{rows[-1]['predicted_bytes'] / 1e9:.1f} GB: {LONG}, {attention}")
            store(long=rows)
    README.write_text(replaced(README.read_text(), "metagradients-table", table(record)))
    print(table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
