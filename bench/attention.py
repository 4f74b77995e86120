"""Second-order attention in linear memory against the whole softmax, on this machine.

python -m bench.attention            measure, then store bench/records/attention.json
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

Takes about two minutes of CPU. Times are CPU times of the process with all threads, which a busy
machine changes least; `wall_ms` stands beside them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "records" / "attention.json"
REPETITIONS = 2
LONG = (1, 4096, 4, 64)  # (B, S, H, d)
LENGTHS = (1024, 4096, 16384, 65536)
TRAINING = {"B64_S63_H4_d16": (64, 63, 4, 16), "B8_S127_H4_d64": (8, 127, 4, 64)}


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


def measure_long(attend: Callable[..., Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    found: dict[str, Any] = {}
    arguments = operands(LONG)
    for name in ("reverse_over_reverse", "forward_over_reverse"):
        runs = {
            kind: compiled(f, name, arguments)
            for kind, f in (("naive", naive), ("chunked", attend))
        }
        times, results = interleaved(
            {kind: functools.partial(run, *arguments) for kind, run in runs.items()}, REPETITIONS
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


def measure_memory(attend: Callable[..., Any]) -> dict[str, Any]:
    """Compilation only: temporary bytes over the bytes of q."""
    import jax
    import jax.numpy as jnp

    found: dict[str, Any] = {}
    for name in ("gradient", "reverse_over_reverse", "forward_over_reverse"):
        row = {}
        for length in LENGTHS:
            shape = (LONG[0], length, *LONG[2:])
            like = (jax.ShapeDtypeStruct(shape, jnp.float32),) * 3
            run = compiled(attend, name, (like, like))
            row[str(length)] = round(_bytes(run) / (4 * length * LONG[2] * LONG[3]), 2)
        found[name] = row
    return found


def measure_training(attend: Callable[..., Any]) -> dict[str, Any]:
    import jax

    peer = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    found: dict[str, Any] = {}
    for shape_name, shape in TRAINING.items():
        arguments = operands(shape)
        runs = {
            (kind, name): compiled(f, name, arguments)
            for kind, f in (("jax_nn", peer), ("chunked", attend))
            for name in ("gradient", "forward_over_reverse")
        }
        calls = {key: functools.partial(run, *arguments) for key, run in runs.items()}
        times, _ = interleaved(calls, 5 * REPETITIONS)
        found[shape_name] = {
            name: {
                kind: times[kind, name] | {"temp_mb": _megabytes(runs[kind, name])}
                for kind in ("jax_nn", "chunked")
            }
            for name in ("gradient", "forward_over_reverse")
        }
    return found


def _bytes(run: Any) -> int:
    return run.memory_analysis().temp_size_in_bytes


def _megabytes(run: Any) -> float:
    return round(_bytes(run) / 1e6, 1)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.attention: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        import jax

        from metagrad_filter.kernels.attention import attention  # pyright: ignore[reportMissingImports]

        attend = functools.partial(attention, implementation="chunked")
        record: dict[str, Any] = {
            "environment": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "jaxlib": importlib.metadata.version("jaxlib"),
                "backend": jax.default_backend(),
                "cpus": os.cpu_count(),
                "load_before": round(os.getloadavg()[0], 2),
            },
            "repetitions": {"long": REPETITIONS, "training": 5 * REPETITIONS},
        }
        for question, measure in (
            ("long", measure_long),
            ("memory", measure_memory),
            ("training", measure_training),
        ):
            record[question] = measure(attend)
            print(f"{question}: done", file=sys.stderr, flush=True)
        record["environment"]["load_after"] = round(os.getloadavg()[0], 2)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
