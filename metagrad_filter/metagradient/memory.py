"""How much device memory a metagradient will take, from its compiled programs, without running it.

Arguments may be `jax.ShapeDtypeStruct`s, so a model need not fit, or exist, where the question is
asked. What the compiler of this machine plans for its own device is what is counted: another
backend fuses and schedules differently, while tape, anchors and cotangents are the same everywhere.

Cost: compiling the programs of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.plan import plan_sweep
from metagrad_filter.metagradient.sweep import Segment, advance, begin, sweep, sweep_whole
from metagrad_filter.metagradient.tape import Tape, sizes_of
from metagrad_filter.types import Loss, Outer, PyTree


@dataclass(frozen=True)
class MemoryPrediction:
    """Device memory of one call of `metagradients`, in bytes.

    Attributes:
      peak_bytes: at the fullest moment, inputs included.
      programs: what each compiled program takes while it runs: arguments, results, temporaries.
      kept_bytes: what is kept beside the fullest program: anchors and the end of the trajectory.
      host_bytes: anchors and end of the trajectory in host memory.
      tape: what the sweep keeps.
    """

    peak_bytes: int
    programs: dict[str, int]
    kept_bytes: int
    host_bytes: int
    tape: Tape


def predict_memory(
    loss: Loss,
    outer: Outer | Mapping[str, Outer],
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    microbatch: int | None = None,
    tape: str = "auto",
    levels: int | None = None,
    offload: bool | None = None,
    differentiation: str = "forward_over_reverse",
    free_bytes: int | None = None,
) -> MemoryPrediction:
    """Predicts the peak device memory of `metagradients` with the same arguments.

    With anchors in host memory, `params` and `opt_state` are taken to be host arrays as well
    (numpy), which go to the device only while they are needed.

    Args:
      free_bytes: device memory that "auto" may count on, None for unknown.

    The other arguments are those of `metagradients`; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
      `MemoryPrediction`, in bytes.

    Raises:
      ConfigError: an argument is out of its domain, or this jax backend does not say what its
        programs take.
    """
    shapes = jax.eval_shape(lambda *x: x, params, opt_state, batches)
    state, batches = (shapes[0], shapes[1]), shapes[2]
    outers = dict(outer) if isinstance(outer, Mapping) else {"": outer}
    steps, size = jax.tree.leaves(batches)[0].shape[:2]
    program, plan = plan_sweep(
        loss,
        outers,
        *state,
        steps,
        stacked=isinstance(outer, Mapping),
        optimizer=optimizer,
        microbatch=microbatch,
        tape=tape,
        levels=levels,
        offload=offload,
        differentiation=differentiation,
        free_bytes=free_bytes,
    )
    blocks = math.ceil((plan.spans[-1] if plan.spans else steps) / plan.block)

    def cut(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((blocks, plan.block, *x.shape[1:]), x.dtype)

    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(state[0])), jnp.float32)
    segment = Segment(
        jax.tree.map(cut, batches),
        jax.ShapeDtypeStruct((blocks, plan.block, size), dtype),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((blocks, plan.block), bool),  # pyright: ignore[reportArgumentType]
    )
    if not plan.spans:
        whole = _taken(sweep_whole.lower(state, segment, program=program))
        return MemoryPrediction(whole, {"sweep_whole": whole}, 0, 0, plan)
    _, carry = jax.eval_shape(lambda s: begin(s, program=program), state)
    programs = {
        "advance": _taken(advance.lower(state, segment, program=program)),
        "begin": _taken(begin.lower(state, program=program)),
        "sweep": _taken(sweep.lower(state, segment, carry, program=program)),
    }
    one = sizes_of(*state, len(outers)).state
    widths = (steps, *plan.spans)
    anchors = sum(math.ceil(a / b) - 1 for a, b in zip(widths, plan.spans))
    # Of the anchors one is an argument of the sweep, and beside them stands the end. The inputs are
    # the first anchor; once a later one is swept they are kept beside it.
    kept = 0 if plan.offload else (anchors + 1) * one
    host = (anchors + 1) * one if plan.offload else 0
    return MemoryPrediction(kept + max(programs.values()), programs, kept, host, plan)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory in bytes that a compiled program takes: arguments, results, temporaries.

    Raises:
      ConfigError: this jax backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise ConfigError(
            f"the jax backend {jax.default_backend()!r} does not say what its programs take; "
            "predict on another one, for instance with JAX_PLATFORMS=cpu."
        )
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def _taken(lowered: jax.stages.Lowered) -> int:
    return program_bytes(lowered.compile())
