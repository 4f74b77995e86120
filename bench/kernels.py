"""The Hopper kernels of attention: their machine code, whether they are right, how fast they are.

python -m bench.kernels --compile   build, check the compiler's report: records/kernels_compile.json
python -m bench.kernels --all       this, then checks and times on a GPU: records/kernels.json, .svg
python -m bench.kernels --table     print the stored records

`--compile` needs nvcc, THUNDERKITTENS_ROOT and, for the issue slots, cuobjdump (on the PATH, or
named by CUOBJDUMP); where one is absent it says so in one line and leaves the record as it is. It
exits with 1 where a kernel spills, runs serialised, or where a score of adj costs more than 45
issue slots, over both sweeps or in the fused one, at head dimension 64.

On a GPU of compute capability 9.0, `--all` measures, for at most `--seconds` (480 by default):
- `checks`: each primitive on fresh random data in bfloat16, on memory filled with NaN before,
  against the reference in float32: relative error and cosine of each output; and a product with the
  Hessian where keys and values have a mean of four standard deviations.
- `long`: one metagradient of GPT-2 124M at S = 32,768 (one window, T = 2, bfloat16) by kernels
  for GPUs: seconds of a call that compiled before, and peak memory.
- `metagradient`: seconds of a round of GPT-2 124M, random weights, L = 1024, T = 16, with either
  implementation in its layers; "xla" is the whole softmax as jax differentiates it.
- `primitives` and `hessian`: milliseconds (median of rounds of calls that are waited for), TFLOP/s
  of the products that are needed (recomputation not counted) and their share of the rate of a
  matrix product in the same run. `hessian` is a product with the Hessian, reverse over reverse,
  by every implementation, flash-hog where it imports. `published` are figures of others, and a row
  of the same shape says how many times faster it is than those.
Without such a GPU these rows stay empty and say so.

flash-hog 0.6.0 (Python 3.12 and 3.13) needs jaxtyping, which it does not declare: with that it
imports under jax 0.10.2 and 0.11.1, and does not under 0.11.2, where private names of jax that it
takes are gone; it takes `(B, S, H, d)` and `is_causal`, as it is called here, and needs cuDNN.
"""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import sass
from bench.record import environment, say, write_record

RECORDS = Path(__file__).parent / "records"
COMPILED, MEASURED = RECORDS / "kernels_compile.json", RECORDS / "kernels.json"
MOST_SLOTS = 45  # of adj, row and column sweep, head dimension 64; the published kernel: 129
TOKENS, HEADS = 262_144, 12
LENGTHS = (512, 2048, 8192, 32_768, 131_072)
WIDTHS = (64, 128)
SHORT = ((64, 128), (8, 1024))  # (B, S) where proxies train
# Forward, backward and double backward of flash-hog on an H200, causal, milliseconds: BENCHMARKS.md
# of https://github.com/kesavanramakrishnan/flash-hog (0.5.0). The forward and backward passes are
# cuDNN's in both, the double backward is in ThunderKittens or in Pallas.
PUBLISHED = [
    {"shape": [batch, length, HEADS, 64], "device": "H200", "milliseconds": milliseconds}
    for batch, length, milliseconds in (
        (1, 8192, {"thunderkittens": 5.56}),
        (512, 512, {"thunderkittens": 18.3, "pallas": 27.7}),
        (128, 2048, {"thunderkittens": 44.8, "pallas": 78.3}),
        (32, 8192, {"thunderkittens": 151.0, "pallas": 281.0}),
        (8, 32_768, {"thunderkittens": 578.0, "pallas": 1104.0}),
        (2, 131_072, {"thunderkittens": 2287.0, "pallas": 4603.0}),
    )
]
# Products of S x S x d that a primitive needs, and a product with the Hessian.
PRODUCTS = {"fwd": 2, "lin": 5, "bwd": 5, "hess": 12, "adj": 12, "hessian": 24}
FUSED = ("bwd", "hess", "adj")  # of these there is a variant in one sweep, for d up to 64
MOST_ERROR, LEAST_COSINE = 5e-3, 0.9999
IMPLEMENTATIONS = ("thunderkittens", "thunderkittens_fused", "pallas", "chunked", "flash_hog")
CHUNKED_UP_TO = 8192  # beyond, its loops take minutes on a GPU
# GPT-2 124M: windows, tokens, steps and windows of a microbatch, by question.
ROUNDS_OF = {"long": [(1, 32_768, 2, 1)], "metagradient": [(8, 1024, 16, 8), (64, 1024, 16, 8)]}
IN_LAYERS = ("thunderkittens", "pallas", "chunked", "xla")
ROUNDS = 5


def shapes() -> list[tuple[int, int, int, int]]:
    """(B, S, H, d) of every row."""
    long = [(TOKENS // s, s, HEADS, d) for d in WIDTHS for s in LENGTHS]
    return [*((b, s, HEADS, 64) for b, s in SHORT), (1, 8192, HEADS, 64), *long]


def variants(width: int) -> list[tuple[str, bool]]:
    """Primitives with kernels for this head dimension, and whether the fused one is meant."""
    return [(x, False) for x in PRODUCTS if x != "hessian"] + [
        (x, True) for x in FUSED if width <= 64
    ]


def titled(name: str, fused: bool) -> str:
    return name + "_fused" * fused


# What the compiler made.


def compile_all() -> bool:
    """Builds, applies the gate and counts issue slots; whether all of it passed or was skipped."""
    from metagrad_filter.errors import ConfigError
    from metagrad_filter.kernels.attention.thunderkittens import building  # pyright: ignore[reportMissingImports]

    tools = building.toolkit()
    if isinstance(tools, str):
        say(f"kernels for Hopper: not built: {tools}.")
        return True
    try:
        library = building.build(tools, building.cache_folder())
    except ConfigError as error:
        say(f"kernels for Hopper: {error}")
        return False
    log = building.report(library).read_text()
    found = {}
    for kernel in building.gate(log):
        named = sass.describe(kernel.name)
        found[sass.title(named)] = {
            **{key: named[key] for key in ("tile", "stages")},
            **{key: getattr(kernel, key) for key in ("registers", "stack", "spills")},
        }
    say(f"{len(found)} kernels for sm_90a: no spills, no C7508, no C7512.")
    cuobjdump = sass.find(os.environ)
    if cuobjdump is None:
        say("issue slots: not counted: cuobjdump is not on the PATH; name it with CUOBJDUMP.")
        return True
    for name, counts in sass.slots(library, cuobjdump).items():
        found[name] |= counts
    adj = sum(found[f"adj {sweep}, d 64"]["per_element"] for sweep in ("row", "column"))
    fused = found["adj fused, d 64"]["per_element"]
    record = {
        "compiler": tools.release,
        "thunderkittens": building.pinned()["commit"],
        "target": "sm_90a",
        "adj_slots_per_element": {
            **{"d 64": round(adj, 2), "d 64, fused": fused},
            **{"most": MOST_SLOTS, "published": 129},
        },
        "kernels": dict(sorted(found.items())),
    }
    write_record(COMPILED, record)
    say(f"adj: {adj:.1f} issue slots a score, fused {fused:.1f}, at most {MOST_SLOTS}.")
    return max(adj, fused) <= MOST_SLOTS


# What a GPU makes of it.


def poison() -> None:
    """Fills memory that the next calls allocate with NaN."""
    import jax
    import jax.numpy as jnp

    jax.block_until_ready([jnp.full((1 << 28,), jnp.nan) for _ in range(4)])


def operands(name: str, shape: tuple[int, ...], key_heads: int, seed: int, pattern: Any) -> Any:
    """Operands of a primitive in bfloat16, statistics consistent with them."""
    import jax
    import jax.numpy as jnp

    from metagrad_filter.kernels.attention import thunderkittens  # pyright: ignore[reportMissingImports]
    from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]

    keys = iter(jax.random.split(jax.random.key(seed), 16))
    like = {"q": shape, "k": (*shape[:2], key_heads, shape[3])}
    like["r"] = (shape[0], shape[2], shape[1])
    kinds = OPERANDS[name][0]
    made = [jax.random.normal(next(keys), like[kind], jnp.float32) for kind in kinds]
    made = [x if kind == "r" else x.astype(jnp.bfloat16) for kind, x in zip(kinds, made)]
    if name != "fwd":
        made[3] = jax.jit(functools.partial(thunderkittens.run, "fwd", pattern))(*made[:3])[1]
    return made


def check(seed: int) -> list[dict[str, Any]]:
    """Errors of each primitive against the reference, by pattern."""
    import jax
    import jax.numpy as jnp

    from metagrad_filter.kernels.attention import reference, thunderkittens  # pyright: ignore[reportMissingImports]
    from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]

    cases = [
        ("causal", (2, 1000, 4, 64), 4, (None, 0)),
        ("causal", (2, 1000, 4, 128), 4, (None, 0)),
        ("window, shared keys", (2, 1111, 4, 64), 2, (300, 0)),
        ("all, shared keys", (2, 777, 4, 128), 1, (None, None)),
        ("packed documents", (2, 1000, 4, 64), 4, (None, 0)),
    ]
    rows = []
    for title, shape, key_heads, sides in cases:
        pattern = Pattern(shape[3] ** -0.5, *sides)
        ids = []
        if title == "packed documents":
            cuts = jax.random.randint(jax.random.key(seed + 1), shape[:2], 0, 5)
            ids = [jnp.sort(cuts, axis=1).astype(jnp.int32)]
        for name, fused in variants(shape[3]):
            made = operands(name, shape, key_heads, seed, pattern)
            run = functools.partial(thunderkittens.run, name, pattern, fused=fused)
            poison()
            found = jax.jit(run)(*made, *ids)
            wide = [x.astype(jnp.float32) for x in made]
            with jax.default_matmul_precision("highest"):
                whole = jax.jit(functools.partial(reference.run, name, pattern))(*wide, *ids)
            error, cosine = agreement(found, whole)
            passed = error <= MOST_ERROR and cosine >= LEAST_COSINE
            row = {"primitive": titled(name, fused), "pattern": title, "shape": list(shape)}
            rows.append(row | {"error": error, "cosine": cosine, "passed": passed})
    return [*rows, *(check_means(name, seed) for name in IMPLEMENTATIONS[:2])]


def check_means(implementation: str, seed: int) -> dict[str, Any]:
    """A product with the Hessian where keys and values are far from 0."""
    import jax
    import jax.numpy as jnp

    from metagrad_filter.kernels.attention import attention  # pyright: ignore[reportMissingImports]

    shape = (1, 1024, 4, 64)
    draws = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 6)]
    x = [(y + 4 * (i > 0)).astype(jnp.bfloat16) for i, y in enumerate(draws[:3])]
    along = [y.astype(jnp.bfloat16) for y in draws[3:]]
    found = jax.jit(hessian(functools.partial(attention, implementation=implementation)))(x, along)
    exact = jax.jit(hessian(functools.partial(attention, implementation="reference")))
    with jax.default_matmul_precision("highest"):
        whole = exact(*([y.astype(jnp.float32) for y in z] for z in (x, along)))
    error, cosine = agreement(found, whole)
    passed = error <= 4 * MOST_ERROR and cosine >= 0.999
    row = {"primitive": "hessian", "pattern": "causal, means of 4", "shape": list(shape)}
    row["implementation"] = implementation
    return row | {"error": error, "cosine": cosine, "passed": passed}


def agreement(found: Any, whole: Any) -> tuple[float, float]:
    """The largest relative error and the least cosine over outputs."""
    import numpy as np

    errors, cosines = [], []
    for x, y in zip(found, whole, strict=True):
        x, y = (np.asarray(z, np.float64).ravel() for z in (x, y))
        lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
        errors.append(float(np.linalg.norm(x - y) / np.linalg.norm(y)))
        cosines.append(float(x @ y) / lengths)
    return max(errors), min(cosines)


def hessian(attend: Callable[..., Any]) -> Callable[..., Any]:
    """A product with the Hessian of a sum of sines of outputs, by reverse over reverse."""
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x).astype(jnp.float32))), (0, 1, 2))

    def slope(x, along):
        return sum(jnp.vdot(a, b).astype(jnp.float32) for a, b in zip(gradient(*x), along))

    return jax.grad(slope)


def milliseconds(call: Callable[[], Any]) -> float:
    """Median over rounds; a round is as many calls as take a tenth of a second."""
    import jax

    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, round(0.1 / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def matrix_rate() -> float:
    """TFLOP/s of a matrix product of 8192 x 8192 x 8192 in bfloat16."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * 8192**3 / milliseconds(lambda: product(a, a)) / 1e9


def rate(name: str, shape: tuple[int, ...], spent: float, peak: float) -> dict[str, Any]:
    batch, length, heads, width = shape
    # Half of the scores of a causal product are needed.
    rate = PRODUCTS[name] * batch * heads * length**2 * width / spent / 1e9
    return {
        "milliseconds": round(spent, 3),
        "tflops": round(rate, 1),
        "share_of_peak": round(rate / peak, 3),
    }


def attends() -> dict[str, Callable[..., Any]]:
    """Causal attention by every implementation that imports."""
    from metagrad_filter.kernels.attention import attention  # pyright: ignore[reportMissingImports]

    found = {
        name: functools.partial(attention, implementation=name) for name in IMPLEMENTATIONS[:-1]
    }
    try:
        from flash_hog import dot_product_attention  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        say(f"flash-hog: does not import: {error}")
        return found
    return found | {"flash_hog": functools.partial(dot_product_attention, is_causal=True)}


def against_published(shape: Sequence[int], spent: float) -> dict[str, float]:
    """How many times faster a product with the Hessian is than what is published for its shape.

    Args:
      shape: `(B, S, H, d)`.
      spent: milliseconds of the product.

    Returns:
      Published milliseconds over `spent`, by what they were published for; empty for other shapes.
    """
    for row in PUBLISHED:
        if row["shape"] == list(shape):
            return {name: round(each / spent, 2) for name, each in row["milliseconds"].items()}
    return {}


def decoder_rounds(question: str, seed: int, late: Callable[[], bool]) -> list[dict[str, Any]]:
    """Rows of metagradients of GPT-2 124M with each implementation in its layers."""
    rows = []
    for shape in ROUNDS_OF[question]:
        for name in IN_LAYERS:
            row = _round_row(name, shape)
            if late():
                row["why"] = "not measured: out of time"
            elif name in ("chunked", "xla") and shape[1] > CHUNKED_UP_TO:
                row["why"] = "not measured: no time or room for it at this length"
            else:
                try:
                    row |= decoder_round(name, shape, seed)
                except Exception as error:  # an implementation that cannot is a row too
                    row["why"] = _failure(error)
            say(f"{question} {name} {shape}: {row.get('why') or row['seconds']}")
            rows.append(row)
    return rows


def decoder_round(name: str, shape: tuple[int, int, int, int], seed: int) -> dict[str, Any]:
    """Seconds and peak bytes of one metagradient, compiled and run once before."""
    import jax
    import numpy as np
    import optax

    import metagrad_filter as mgf
    from bench.metagradients import gpt2
    from metagrad_filter.proxy import DecoderLoss, init_decoder
    from metagrad_filter.targets import mean_loss

    windows, tokens, steps, microbatch = shape
    config = gpt2(tokens, dtype="bfloat16", attn_implementation=name)
    loss = DecoderLoss(config)
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.integers, 0, config.vocab_size, dtype=np.int32)
    held_out = draw(size=(microbatch, tokens + 1))
    batches = draw(size=(steps, windows, tokens + 1))
    optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=0.01)
    params = init_decoder(config, seed=0)
    state = (params, jax.jit(optimizer.init)(params))
    run = functools.partial(
        mgf.metagradients,
        loss,
        mean_loss(loss, held_out, microbatch),
        *state,
        batches,
        optimizer=optimizer,
        microbatch=microbatch,
    )
    before = _peak_bytes()
    jax.block_until_ready(run().scores)
    start = time.perf_counter()
    found = run()
    jax.block_until_ready(found.scores)
    seconds, peak = time.perf_counter() - start, _peak_bytes()
    # The high-water mark of a process never falls: it is this row's where this row has raised it.
    raised = None not in (before, peak) and peak > before
    return {
        "seconds": round(seconds, 3),
        "peak_bytes": peak if raised else None,
        "tape": str(found.tape),
        "finite": bool(np.isfinite(np.asarray(found.scores)).all()),
    }


def _peak_bytes() -> Any:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _round_row(name: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    sizes = dict(zip(("windows", "tokens", "steps", "microbatch"), shape, strict=True))
    return {"name": name, **sizes, "seconds": None, "peak_bytes": None}


def _failure(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:160]
    return f"not measured: {type(error).__name__}: {text}"


def measure(seconds: float, seed: int) -> dict[str, Any]:
    """Checks and times on this machine's GPU."""
    begun = time.monotonic()

    def late() -> bool:
        return time.monotonic() - begun > seconds

    rows: dict[str, Any] = {"checks": check(seed)}
    say(f"checks: {sum(x['passed'] for x in rows['checks'])} of {len(rows['checks'])} passed")
    rows["long"] = decoder_rounds("long", seed, late)
    rows["metagradient"] = decoder_rounds("metagradient", seed, late)
    peak = matrix_rate()
    rows["peak_tflops"] = round(peak, 1)
    for question, name, shape, call in calls(seed):
        row = {"name": name, "shape": list(shape), "milliseconds": None}
        rows.setdefault(question, []).append(row)
        if late():
            row["why"] = "not measured: out of time"
            continue
        try:
            kind = "hessian" if question == "hessian" else name.removesuffix("_fused")
            spent = milliseconds(call())
            row |= rate(kind, shape, spent, peak)
            if question == "hessian" and (times := against_published(shape, spent)):
                row["times_faster_than_published"] = times
        except Exception as error:  # a peer that cannot is a row of the record
            row["why"] = _failure(error)
        say(f"{question} {name} {shape}: {row.get('why') or row['milliseconds']}")
    return rows


def calls(seed: int) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], Any]]]:
    """Every row: question, name, shape, and what prepares a call to time."""
    found = attends()
    for shape in shapes():
        for name, attend in found.items():
            if name != "chunked" or shape[1] <= CHUNKED_UP_TO:
                yield "hessian", name, shape, functools.partial(_hessian_call, attend, shape, seed)
        for name, fused in variants(shape[3]):
            call = functools.partial(_primitive_call, name, fused, shape, seed)
            yield "primitives", titled(name, fused), shape, call


def _hessian_call(attend: Callable[..., Any], shape: tuple[int, ...], seed: int) -> Any:
    import jax
    import jax.numpy as jnp

    draws = jax.random.normal(jax.random.key(seed), (6, *shape), jnp.bfloat16)
    x, along = list(draws[:3]), list(draws[3:])
    return functools.partial(jax.jit(hessian(attend)), x, along)


def _primitive_call(name: str, fused: bool, shape: tuple[int, ...], seed: int) -> Any:
    import jax

    from metagrad_filter.kernels.attention import thunderkittens  # pyright: ignore[reportMissingImports]
    from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]

    pattern = Pattern(shape[3] ** -0.5, None, 0)
    made = operands(name, shape, shape[2], seed, pattern)
    run = functools.partial(thunderkittens.run, name, pattern, fused=fused)
    return functools.partial(jax.jit(run), *made)


def empty() -> dict[str, Any]:
    """The rows of a machine that cannot measure."""
    nothing = {"milliseconds": None, "tflops": None, "share_of_peak": None, "why": "not measured"}
    rows: dict[str, Any] = {"checks": [], "peak_tflops": None, "hessian": [], "primitives": []}
    for shape in shapes():
        primitives = [titled(*variant) for variant in variants(shape[3])]
        names = {"hessian": IMPLEMENTATIONS, "primitives": primitives}
        for question, each in names.items():
            rows[question] += [{"name": name, "shape": list(shape), **nothing} for name in each]
    for question, each in ROUNDS_OF.items():
        rows[question] = [
            _round_row(name, shape) | {"why": "not measured"}
            for shape in each
            for name in IN_LAYERS
        ]
    return rows


def plot(rows: dict[str, Any], path: Path) -> None:
    """TFLOP/s of the product with the Hessian by sequence length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(WIDTHS), figsize=(10, 4), sharey=True)
    for axis, width in zip(axes, WIDTHS, strict=True):
        for name in IMPLEMENTATIONS:
            points = [
                (x["shape"][1], x["tflops"])
                for x in rows["hessian"]
                if x["name"] == name and x["shape"][3] == width and x.get("tflops")
                if x["shape"][0] * x["shape"][1] == TOKENS
            ]
            if points:
                axis.plot(*zip(*points), marker="o", label=name)
        axis.set(xscale="log", xlabel="S", title=f"d = {width}, B x S = {TOKENS:,}")
    axes[0].set_ylabel("TFLOP/s, causal, reverse over reverse")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.kernels")
    what = parser.add_mutually_exclusive_group(required=True)
    for flag in ("--compile", "--all", "--table"):
        what.add_argument(flag, action="store_true")
    parser.add_argument("--seconds", type=float, default=480.0, help="of measuring, at most")
    asked = parser.parse_args(arguments)
    if asked.table:
        for path in (COMPILED, MEASURED):
            print(path.read_text() if path.is_file() else f"{path.name}: no record yet")
        return
    passed = compile_all()
    if asked.all:
        import jax

        from metagrad_filter.kernels.attention import thunderkittens  # pyright: ignore[reportMissingImports]

        why = thunderkittens.reason()
        seed = secrets.randbelow(1 << 31) if why is None else None
        rows = empty() if seed is None else measure(asked.seconds, seed)
        device = jax.devices()[0].device_kind if why is None else f"not measured: {why}"
        head = {"environment": environment("jax", "jaxlib"), "device": device, "seed": seed}
        write_record(MEASURED, head | {"published": PUBLISHED} | rows)
        if why is None:
            plot(rows, MEASURED.with_suffix(".svg"))
            passed &= all(x["passed"] for x in rows["checks"])
        else:
            say(f"GPU: not measured: {why}.")
    sys.exit(not passed)


if __name__ == "__main__":
    main(sys.argv[1:])
