"""From the arguments of a metagradient to its compiled program and its tape.

What runs (`adjoint.py`) and what only predicts memory (`memory.py`) plan here, so that one cannot
differ from the other. Pure, but for one small compiled look at the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import optax
from jax.sharding import Mesh

from metagrad_filter.metagradient.optimizer import singular_moments
from metagrad_filter.metagradient.sweep import Program, slots
from metagrad_filter.metagradient.tape import Tape, choose_tape, has_host_memory, sizes_of
from metagrad_filter.types import Loss, Outer, PyTree


def plan_sweep(
    loss: Loss,
    outers: Mapping[str, Outer],
    params: PyTree,
    opt_state: PyTree,
    steps: int,
    *,
    stacked: bool,
    optimizer: optax.GradientTransformation,
    microbatch: int | None,
    tape: str,
    levels: int | None,
    offload: bool | None,
    differentiation: str,
    free_bytes: int | None,
    mesh: Mesh | None = None,
) -> tuple[Program, Tape]:
    """The program and the tape of a trajectory of `steps` steps.

    Args:
      outers: outer metrics by name; one where not `stacked`.
      params, opt_state: arrays or `jax.ShapeDtypeStruct`s.
      stacked: whether results carry an axis of targets.
      free_bytes: free device memory in bytes, None for unknown.
      mesh: over which the batches are sharded, None for one device.

    The other arguments are those of `metagradients`.

    Raises:
      ConfigError: the tape's arguments are out of their domain, or `opt_state` is not a state of
        this optimizer for these parameters.
    """
    kept = choose_tape(
        tape,
        steps,
        sizes_of(params, opt_state, len(outers)),
        levels=levels,
        offload=offload,
        free_bytes=free_bytes,
        has_host_memory=has_host_memory(params),
    )
    program = Program(
        loss=loss,
        outers=tuple(outers.values()),
        stacked=stacked,
        optimizer=optimizer,
        microbatch=microbatch,
        differentiation=differentiation,
        singular=singular_moments(optimizer, params, opt_state),
        skips=slots(kept, steps) != steps,
        mesh=mesh,
    )
    return program, kept
