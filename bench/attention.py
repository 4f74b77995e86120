"""Second-order attention in linear memory against the whole softmax, on this machine.

python -m bench.attention            measure, then store bench/records/attention.json
python -m bench.attention --quick    the same at tiny sizes, printed and not stored
python -m bench.attention --table    print the stored record

- `long`: one product with the Hessian of a sum of sines of attention's outputs, by reverse over
  reverse and by forward over reverse, at S = 4096, causal, 4 heads of 64, float32. "naive" is the
  whole softmax in `jax.numpy`, which jax differentiates. Runs of both are interleaved; memory is
  what XLA allocates beside inputs and outputs. `largest_relative_difference` compares the results.
- `memory`: the same allocation of the chunked implementation by S, in arrays like q: flat where
  memory is linear.
- `training`: the attention of one layer at the shapes where proxies train, against
  `jax.nn.dot_product_attention`: a gradient, and the tangent of one (an evaluation of a step's
  adjoint).
- `proxy`: the same two of a whole decoder, at the demo's shapes: what a step of a metagradient
  round takes, with either attention in its layers.

Takes about three minutes of CPU. Times are CPU times of the process with all threads, which a busy
machine changes least; `wall_ms` stands beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bench.record import environment, write_record
from bench.second_order import programs as second_order_programs

RECORD = Path(__file__).parent / "records" / "attention.json"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      repetitions: rounds of `long`; `training` and `proxy` take five and three times as many.
      long: `(B, S, H, d)`.
      lengths: each S of `memory`.
      training: `(B, S, H, d)` by name.
      proxies: width, heads, windows, tokens and dtype of a decoder of two layers, by name.
    """

    repetitions: int
    long: tuple[int, int, int, int]
    lengths: tuple[int, ...]
    training: dict[str, tuple[int, int, int, int]]
    proxies: dict[str, tuple[int, int, int, int, str]]


FULL = Sizes(
    repetitions=2,
    long=(1, 4096, 4, 64),
    lengths=(1024, 4096, 16384, 65536),
    training={"B64_S63_H4_d16": (64, 63, 4, 16), "B8_S127_H4_d64": (8, 127, 4, 64)},
    proxies={
        "d48_H2_B64_L64": (48, 2, 64, 64, "float32"),
        "d64_H2_B64_L64": (64, 2, 64, 64, "float32"),
        "d256_H4_B8_L128": (256, 4, 8, 128, "float32"),
        "d48_H2_B64_L64_bfloat16": (48, 2, 64, 64, "bfloat16"),
    },
)
# Everything runs and nothing means anything.
QUICK = Sizes(
    repetitions=1,
    long=(1, 160, 2, 8),
    lengths=(160,),
    training={"tiny": (2, 31, 2, 8)},
    proxies={"tiny": (16, 2, 2, 16, "float32")},
)


def naive(q: Any, k: Any, v: Any) -> Any:
    """The peer at length: causal softmax attention as it is written down."""
    import jax
    import jax.numpy as jnp

    logits = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    shares = jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", shares, v)


def programs(attend: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Functions of (q, k, v) and a direction for each."""
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))

    def slope(x, along):
        return sum(jnp.vdot(a, b) for a, b in zip(gradient(*x), along))

    return {
        "gradient": lambda x, along: gradient(*x),
        "reverse_over_reverse": jax.grad(slope),
        "forward_over_reverse": lambda x, along: jax.jvp(gradient, x, along)[1],
    }


def operands(shape: tuple[int, ...]) -> tuple[Any, Any]:
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(6)]
    return tuple(arrays[:3]), tuple(arrays[3:])


def compiled(attend: Callable[..., Any], name: str, arguments: Any) -> Any:
    import jax

    return jax.jit(programs(attend)[name]).lower(*arguments).compile()


def interleaved(
    calls: dict[Any, Callable[[], Any]], repetitions: int
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Medians of CPU and wall milliseconds of each call (not of the first), and its results."""
    import jax

    samples: dict[Any, list[tuple[float, float]]] = {name: [] for name in calls}
    results: dict[Any, Any] = {}
    for round_ in range(repetitions + 1):
        for name, call in calls.items():
            start, wall = time.process_time(), time.perf_counter()
            results[name] = jax.block_until_ready(call())
            if round_:
                now = time.process_time() - start, time.perf_counter() - wall
                samples[name].append(now)
    medians = {
        name: {
            key: round(statistics.median(x[i] for x in found) * 1e3, 1)
            for i, key in enumerate(("cpu_ms", "wall_ms"))
        }
        for name, found in samples.items()
    }
    return medians, results


def measure_long(attend: Callable[..., Any], sizes: Sizes) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    found: dict[str, Any] = {}
    arguments = operands(sizes.long)
    for name in ("reverse_over_reverse", "forward_over_reverse"):
        runs = {
            kind: compiled(f, name, arguments)
            for kind, f in (("naive", naive), ("chunked", attend))
        }
        times, results = interleaved(
            {kind: functools.partial(run, *arguments) for kind, run in runs.items()},
            sizes.repetitions,
        )
        row: dict[str, Any] = {
            kind: times[kind] | {"temp_mb": _megabytes(run)} for kind, run in runs.items()
        }
        row["naive_to_chunked"] = {
            key: round(row["naive"][key] / row["chunked"][key], 2)
            for key in ("cpu_ms", "wall_ms", "temp_mb")
        }
        row["largest_relative_difference"] = max(
            float(jnp.abs(x - y).max() / jnp.abs(x).max())
            for x, y in zip(*map(jax.tree.leaves, (results[kind] for kind in runs)))
        )
        found[name] = row
    return found


def measure_memory(attend: Callable[..., Any], sizes: Sizes) -> dict[str, Any]:
    """Compilation only: temporary bytes over the bytes of q."""
    import jax
    import jax.numpy as jnp

    found: dict[str, Any] = {}
    for name in ("gradient", "reverse_over_reverse", "forward_over_reverse"):
        row = {}
        for length in sizes.lengths:
            shape = (sizes.long[0], length, *sizes.long[2:])
            like = (jax.ShapeDtypeStruct(shape, jnp.float32),) * 3
            run = compiled(attend, name, (like, like))
            row[str(length)] = round(_bytes(run) / (4 * length * sizes.long[2] * sizes.long[3]), 2)
        found[name] = row
    return found


def measure_training(attend: Callable[..., Any], sizes: Sizes) -> dict[str, Any]:
    import jax

    peer = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    found: dict[str, Any] = {}
    for shape_name, shape in sizes.training.items():
        arguments = operands(shape)
        runs = {
            (kind, name): compiled(f, name, arguments)
            for kind, f in (("jax_nn", peer), ("chunked", attend))
            for name in ("gradient", "forward_over_reverse")
        }
        calls = {key: functools.partial(run, *arguments) for key, run in runs.items()}
        times, _ = interleaved(calls, 5 * sizes.repetitions)
        found[shape_name] = {
            name: {
                kind: times[kind, name] | {"temp_mb": _megabytes(runs[kind, name])}
                for kind in ("jax_nn", "chunked")
            }
            for name in ("gradient", "forward_over_reverse")
        }
    return found


def measure_proxy(attend: Callable[..., Any], sizes: Sizes) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder

    peer = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    found: dict[str, Any] = {}
    for shape_name, (width, heads, windows, tokens, dtype) in sizes.proxies.items():
        config = DecoderConfig(
            vocab_size=1024,
            n_positions=tokens,
            n_embd=width,
            n_layer=2,
            n_head=heads,
            activation_function="relu2",
            dtype=dtype,
        )
        loss = DecoderLoss(config)
        params = init_decoder(config, seed=0)
        rng = np.random.default_rng(0)
        data = jnp.asarray(rng.integers(0, 1024, (windows, tokens + 1)), jnp.int32)
        arguments = (params, jax.tree.map(jnp.cos, params), data)
        runs = {
            (kind, name): _swapped(f, second_order_programs(loss)[name], arguments)
            for kind, f in (("jax_nn", peer), ("chunked", attend))
            for name in ("gradient", "evaluation")
        }
        calls = {key: functools.partial(run, *arguments) for key, run in runs.items()}
        times, _ = interleaved(calls, 3 * sizes.repetitions)
        found[shape_name] = {
            name: {
                kind: times[kind, name] | {"temp_mb": _megabytes(runs[kind, name])}
                for kind in ("jax_nn", "chunked")
            }
            for name in ("gradient", "evaluation")
        }
    return found


def _swapped(attend: Callable[..., Any], program: Callable[..., Any], arguments: Any) -> Any:
    """The compiled program of a decoder with this attention in its layers."""
    import jax

    from metagrad_filter.proxy import layers

    with mock.patch.object(layers, "causal_attention", attend):
        # A function of its own each time: jax remembers traces by function.
        return jax.jit(lambda *x: program(*x)).lower(*arguments).compile()


def _bytes(run: Any) -> int:
    return run.memory_analysis().temp_size_in_bytes


def _megabytes(run: Any) -> float:
    return round(_bytes(run) / 1e6, 1)


MEASURES = {
    "long": measure_long,
    "memory": measure_memory,
    "training": measure_training,
    "proxy": measure_proxy,
}


def measured(sizes: Sizes) -> dict[str, Any]:
    import jax

    from metagrad_filter.kernels.attention import attention  # pyright: ignore[reportMissingImports]

    attend = functools.partial(attention, implementation="chunked")
    record: dict[str, Any] = {
        "environment": environment("jax", "jaxlib", "flax")
        | {"backend": jax.default_backend(), "repetitions": sizes.repetitions},
    }
    for question, measure in MEASURES.items():
        record[question] = measure(attend, sizes)
        print(f"{question}: done", file=sys.stderr, flush=True)
    record["environment"]["load_average_after"] = round(os.getloadavg()[0], 1)
    return record


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--quick"], ["--table"]):
        sys.exit(f"bench.attention: unknown arguments {arguments}; expected --quick or --table")
    if arguments == ["--quick"]:
        print(json.dumps(measured(QUICK), indent=1))
        return
    if not arguments:
        write_record(RECORD, measured(FULL))
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
