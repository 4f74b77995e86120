"""What second order costs on this machine, and where: ratios to one gradient.

python -m bench.second_order            measure, then store bench/records/second_order.json
python -m bench.second_order --table    print the stored record

Three questions; the timings of one are interleaved, so that noise hits all alike:

- `model`: a decoder's forward pass, gradient, JVP and evaluation. An evaluation is the JVP of
  (losses, gradient) along a cotangent of which only the tangents are used, which is what the
  adjoint of one inner step takes. Arithmetic alone makes it 8/3 of a gradient: of the 9 products
  that a linear layer needs (3 and their tangents, 2 each) the gradient of the weights is dropped.
- `parts`: the same four for the parts of that decoder alone, at its shapes; `share` is of the sum.
- `cross_entropy`: `token_cross_entropy` against the same loss by `jax.lax.map` of a checkpointed
  piece, with the bytes XLA allocates. "hessian_product" is reverse over reverse.

Reading the record. The target, an evaluation for at most 2.7 gradients, is met for both activations
at both shapes, by the medians; single rounds on a busy machine range from 1.9 to 3. Ratios below
8/3 are possible because a tangent shares the exponentials, norms and transposed copies of its
primal. The parts above it at width 64: the cross-entropy (3.2), whose products are so narrow that
passes over the logits cost as much as they do; attention is close (2.7) and the largest part, as
XLA writes every `(B, H, S, S)` array of the softmax's tangent to memory. The embedding's gather
and the scatter-add of its gradient stay under a hundredth of an evaluation: it has no rule of its
own.

The primitives of the cross-entropy make the same products as the checkpointed piece. In exchange
for fewer passes over the logits (half the memory of a gradient and its tangent at a vocabulary of
50,257, and a tenth to a fifth less time) they take a third exponential a logit, which at small
vocabularies makes an evaluation in chunks about a tenth slower.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import write_record

RECORD = Path(__file__).parent / "records" / "second_order.json"
REPETITIONS, LOSS_REPETITIONS = 5, 2  # the largest loss takes half a minute a round
MODELS = {
    "d64_l2_v1024_B64_L64": {
        "config": {"vocab_size": 1024, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
        "windows": (64, 64),
    },
    "d256_l4_v8192_B8_L128": {
        "config": {
            "vocab_size": 8192,
            "n_positions": 128,
            "n_embd": 256,
            "n_layer": 4,
            "n_head": 4,
        },
        "windows": (8, 128),
    },
}
ACTIVATIONS = ("relu2", "gelu_new")
COLUMNS = ("forward", "gradient", "jvp", "evaluation")
# (N, D, V): positions a chunk.
LOSSES = {(4032, 64, 1024): 512, (2048, 256, 8192): 256, (512, 768, 50257): 128}


def programs(loss: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The functions of `(point, direction, data)` that are timed, for `loss(point, data) -> (n,)`.

    "hessian_product" is reverse over reverse, the others are the columns of `model`.
    """
    import jax

    def gradient(point, data):
        losses, pull_back = jax.vjp(lambda p: loss(p, data), point)
        return losses, pull_back(jax.numpy.ones_like(losses) / losses.shape[0])[0]

    def slope(point, direction, data):
        pairs = zip(jax.tree.leaves(gradient(point, data)[1]), jax.tree.leaves(direction))
        return sum(jax.numpy.vdot(x, y) for x, y in pairs)

    def along(f, point, direction):
        return jax.jvp(f, (point,), (direction,))[1]

    return {
        "forward": lambda p, c, data: loss(p, data),
        "gradient": lambda p, c, data: gradient(p, data),
        "jvp": lambda p, c, data: along(lambda p: loss(p, data), p, c),
        "evaluation": lambda p, c, data: along(lambda p: gradient(p, data), p, c),
        "hessian_product": jax.grad(slope),
    }


def compiled(loss: Callable[..., Any], *arguments: Any, names=COLUMNS) -> dict[str, Any]:
    import jax

    functions = programs(loss)
    return {name: jax.jit(functions[name]).lower(*arguments).compile() for name in names}


def interleaved(calls: dict[Any, Callable[[], Any]], repetitions: int) -> dict[Any, list[float]]:
    """Milliseconds of CPU time of each call, in rounds; the first round does not count."""
    import jax

    samples: dict[Any, list[float]] = {name: [] for name in calls}
    for round_ in range(repetitions + 1):
        for name, call in calls.items():
            start = time.process_time()
            jax.block_until_ready(call())
            if round_:
                samples[name].append((time.process_time() - start) * 1e3)
    return samples


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median over rounds of each ratio to the gradient of the same round."""
    ratios = {
        name: [x / g for x, g in zip(values, samples["gradient"])]
        for name, values in samples.items()
    }
    return {
        "cpu_ms": {name: round(statistics.median(x), 2) for name, x in samples.items()},
        "to_gradient": {name: round(statistics.median(x), 3) for name, x in ratios.items()},
        "evaluation_to_gradient_range": [
            round(min(ratios["evaluation"]), 3),
            round(max(ratios["evaluation"]), 3),
        ],
    }


def measure_models(repetitions: int) -> dict[str, Any]:
    """Whole decoders: each shape with each activation, one compilation of each function."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder

    found: dict[str, Any] = {}
    for name, shape in MODELS.items():
        runs: dict[tuple[str, str], Any] = {}
        calls = {}
        for activation in ACTIVATIONS:
            config = DecoderConfig(**shape["config"], activation_function=activation)
            params = init_decoder(config)
            direction = jax.tree.map(lambda x: 0.01 * jnp.cos(x * 100), params)
            windows = np.random.default_rng(0).integers(0, config.vocab_size, shape["windows"])
            arguments = (params, direction, jnp.asarray(windows, jnp.int32))
            for kind, run in compiled(DecoderLoss(config), *arguments).items():
                runs[activation, kind] = run
                calls[activation, kind] = functools.partial(run, *arguments)
        samples = interleaved(calls, repetitions)
        for activation in ACTIVATIONS:
            kinds = {kind: x for (a, kind), x in samples.items() if a == activation}
            flops = {
                kind: run.cost_analysis()["flops"]
                for (a, kind), run in runs.items()
                if a == activation
            }
            found[f"{name}_{activation}"] = summary(kinds) | {
                "evaluation_flops_to_gradient": round(flops["evaluation"] / flops["gradient"], 3),
                "evaluation_temp_mb": _megabytes(runs[activation, "evaluation"]),
            }
    return found


def parts(config: Any, shape: tuple[int, int], activation: str) -> dict[str, tuple[Any, ...]]:
    """Name -> how often the decoder has the part, its `loss(point, data)`, a point and data."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metagrad_filter.proxy.activations import ACTIVATIONS as BY_NAME
    from metagrad_filter.proxy.cross_entropy import token_cross_entropy

    rng = np.random.default_rng(0)
    batch, length, width = shape[0], shape[1] - 1, config["n_embd"]
    heads, vocab, layers = config["n_head"], config["vocab_size"], config["n_layer"]
    tokens = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)

    def array(*shape):
        return jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)

    # A fixed random readout: every part has a cotangent and a loss for each window.
    readout = array(batch, length, width)
    wide = array(batch, length, 4 * width)

    def norm(p, readout):
        x, scale, bias = p
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
        return jnp.sum(y * readout, (1, 2))

    def attention(p, readout):
        y = jax.nn.dot_product_attention(p[0], p[1], p[2], is_causal=True)
        return jnp.sum(y.reshape(readout.shape) * readout, (1, 2))

    def embedding(p, data):
        tokens, readout = data
        return jnp.sum(jnp.take(p, tokens, axis=0) * readout, (1, 2))

    def activated(p, wide):
        return jnp.sum(BY_NAME[activation](p) * wide, (1, 2))

    def linear(p, readout):
        return jnp.sum((p[0] @ p[1] @ p[2] @ p[3] @ p[4]) * readout, (1, 2))

    heads_shape = (batch, length, heads, width // heads)
    kernels = [(width, 3 * width), (3 * width, width), (width, 4 * width), (4 * width, width)]
    queries = tuple(array(*heads_shape) for _ in range(3))
    logits = (array(batch * length, width), array(vocab, width))
    return {
        "embedding": (1, embedding, array(vocab, width), (tokens, readout)),
        "norms": (2 * layers + 1, norm, (readout + 1, array(width), array(width)), readout),
        "attention": (layers, attention, queries, readout),
        "activation": (layers, activated, wide + 1, wide),
        "linear layers": (layers, linear, (readout + 1, *(array(*s) for s in kernels)), readout),
        "cross-entropy": (
            1,
            lambda p, t: token_cross_entropy(p[0], p[1], t),
            logits,
            tokens.reshape(-1),
        ),
    }


def measure_parts(repetitions: int) -> dict[str, Any]:
    """Each part alone, weighted by how often the decoder has it."""
    import jax
    import jax.numpy as jnp

    found: dict[str, Any] = {}
    for name, shape in MODELS.items():
        pieces = parts(shape["config"], shape["windows"], "gelu_new")
        calls = {}
        for part, (_, loss, point, data) in pieces.items():
            arguments = (point, jax.tree.map(jnp.cos, point), data)
            for kind, run in compiled(loss, *arguments).items():
                calls[part, kind] = functools.partial(run, *arguments)
        samples = interleaved(calls, repetitions)
        rows = {
            part: summary({kind: x for (p, kind), x in samples.items() if p == part})
            for part in pieces
        }
        total = sum(pieces[p][0] * row["cpu_ms"]["evaluation"] for p, row in rows.items())
        for part, row in rows.items():
            row["count"] = pieces[part][0]
            row["share"] = round(row["count"] * row["cpu_ms"]["evaluation"] / total, 3)
        found[name] = rows
    return found


def checkpointed_cross_entropy(hidden: Any, embedding: Any, targets: Any, *, chunk: int) -> Any:
    """The peer: `jax.lax.map` of a checkpointed piece, differentiated by jax alone."""
    import jax
    import jax.numpy as jnp

    def piece(hidden, targets):
        logits = hidden @ embedding.T
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    split = (hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk))
    return jax.lax.map(lambda x: jax.checkpoint(piece)(*x), split).reshape(-1)


def measure_cross_entropy(repetitions: int) -> dict[str, Any]:
    """Ours and the peer, in the same chunks."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metagrad_filter.proxy.cross_entropy import token_cross_entropy

    found: dict[str, Any] = {}
    for (count, width, vocab), chunk in LOSSES.items():
        chunk = next(c for c in range(chunk, 0, -1) if count % c == 0)
        rng = np.random.default_rng(0)
        point = tuple(
            jnp.asarray(0.3 * rng.normal(size=s), jnp.float32)
            for s in ((count, width), (vocab, width))
        )
        targets = jnp.asarray(rng.integers(0, vocab, count), jnp.int32)
        runs, calls = {}, {}
        kinds = {"primitives": token_cross_entropy, "checkpointed": checkpointed_cross_entropy}
        arguments = (point, jax.tree.map(jnp.cos, point), targets)
        for kind, function in kinds.items():
            bound = functools.partial(function, chunk=chunk)
            names = (*COLUMNS, "hessian_product")

            def loss(p, targets, bound=bound):
                return bound(p[0], p[1], targets)

            for name, run in compiled(loss, *arguments, names=names).items():
                runs[kind, name] = run
                calls[kind, name] = functools.partial(run, *arguments)
        samples = interleaved(calls, repetitions)
        row: dict[str, Any] = {"chunk": chunk}
        for kind in kinds:
            mine = {name: x for (k, name), x in samples.items() if k == kind}
            row[kind] = summary(mine) | {
                "temp_mb": {n: _megabytes(run) for (k, n), run in runs.items() if k == kind}
            }
        ours, peer = (calls[kind, "evaluation"]() for kind in kinds)
        row["largest_relative_difference"] = max(
            float(jnp.abs(x - y).max() / jnp.abs(y).max())
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(peer))
        )
        found[f"N{count}_D{width}_V{vocab}"] = row
    return found


def _megabytes(run: Any) -> float:
    return round(run.memory_analysis().temp_size_in_bytes / 1e6, 1)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.second_order: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        import jax

        record: dict[str, Any] = {
            "environment": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "jaxlib": importlib.metadata.version("jaxlib"),
                "backend": jax.default_backend(),
                "cpus": os.cpu_count(),
                "load_before": round(os.getloadavg()[0], 2),
            },
            "repetitions": {"model": REPETITIONS, "cross_entropy": LOSS_REPETITIONS},
            "clock": "CPU time of the process, all threads",
        }
        for question, measure, repetitions in (
            ("model", measure_models, REPETITIONS),
            ("parts", measure_parts, REPETITIONS),
            ("cross_entropy", measure_cross_entropy, LOSS_REPETITIONS),
        ):
            record[question] = measure(repetitions)
            print(f"{question}: done", file=sys.stderr, flush=True)
        record["environment"]["load_after"] = round(os.getloadavg()[0], 2)
        write_record(RECORD, record)
    print(RECORD.read_text(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
