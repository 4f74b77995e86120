"""The compiled programs of a metagradient: forward passes, and the backward sweep over one segment.

A segment is `blocks x block` steps. Its sweep runs it once more, keeps every gradient and the state
before every block, then walks back: within a block the state before a step is replayed from the
state before the block by optimizer updates alone.

Functions here are jitted once per `Program` and shapes; `tape.py` says how long a segment is, and
`adjoint.py` strings segments together.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metagrad_filter.metagradient.optimizer import (
    Leaves,
    apply_update,
    pull_back_update,
    split_floats,
    widened,
)
from metagrad_filter.metagradient.second_order import second_order
from metagrad_filter.metagradient.tape import Tape
from metagrad_filter.metagradient.trajectory import run, skipping
from metagrad_filter.types import Loss, Outer, PyTree

State = tuple[PyTree, PyTree]  # parameters and optimizer state before a step


class Program(NamedTuple):
    """Everything about a sweep that is fixed when it is compiled."""

    loss: Loss
    outers: tuple[Outer, ...]
    stacked: bool
    optimizer: optax.GradientTransformation
    microbatch: int | None
    differentiation: str
    singular: tuple[bool, ...]
    skips: bool  # whether segments hold steps that are not taken
    mesh: Mesh | None


class Carry(NamedTuple):
    """What walks back over the steps; a leading axis of targets where there are several."""

    params: PyTree  # cotangent of the parameters
    floats: Leaves  # cotangents of the float leaves of the optimizer state
    probe: PyTree  # sum of the cotangents of the gradients so far


class Segment(NamedTuple):
    """The steps of one segment; leaves have leading axes `(blocks, block)`."""

    batches: PyTree
    weights: jax.Array
    active: jax.Array  # bool, false for steps that only fill up the last segment


def slots(tape: Tape, steps: int) -> int:
    """Steps in all segments of a trajectory, with those that only fill up the last ones."""
    swept = tape.spans[-1] if tape.spans else steps
    return -(-steps // swept) * -(-swept // tape.block) * tape.block


@functools.partial(jax.jit, static_argnames="program")
def advance(state: State, segment: Segment, *, program: Program) -> State:
    """Takes the steps of a segment and keeps nothing."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), segment)
    return _run(program, state, flat)[0]


@functools.partial(jax.jit, static_argnames="program")
def begin(state: State, *, program: Program) -> tuple[jax.Array, Carry]:
    """Phi of the end of a trajectory, and what the backward sweep starts with."""
    params, opt_state = state
    phis, cotangents = zip(*(jax.value_and_grad(outer)(params) for outer in program.outers))
    phi, of_params = jnp.stack(phis), jax.tree.map(lambda *x: jnp.stack(x), *widened(cotangents))
    if not program.stacked:
        phi, of_params = phi[0], jax.tree.map(lambda x: x[0], of_params)
    lead = (len(phis),) if program.stacked else ()
    floats = [jnp.zeros(lead + f.shape, f.dtype) for f in widened(split_floats(opt_state)[0])]
    return phi, Carry(of_params, floats, jax.tree.map(jnp.zeros_like, of_params))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="carry")
def sweep(
    state: State, segment: Segment, carry: Carry, *, program: Program
) -> tuple[Carry, jax.Array, jax.Array]:
    """Walks back over a segment from the state before it.

    Returns:
      The carry before the segment; scores `(steps, B)`, with an axis of targets before the last
      where there are several; and per step the number of masked coordinates, `(steps,)` int32.
    """
    _, tape = _record(program, state, segment)
    return _walk_back(program, tape, state, segment, carry)


@functools.partial(jax.jit, static_argnames="program")
def sweep_whole(state: State, segment: Segment, *, program: Program):
    """`begin` and `sweep` of a trajectory that is one segment, which runs forward only once.

    Returns:
      The end of the trajectory, Phi, and what `sweep` returns.
    """
    end, tape = _record(program, state, segment)
    phi, carry = begin(end, program=program)
    return end, phi, *_walk_back(program, tape, state, segment, carry)


def _run(program: Program, state: State, steps: Segment, record=None) -> tuple[State, Any]:
    *end, kept = run(
        program.loss,
        program.optimizer,
        *state,
        steps.batches,
        steps.weights,
        microbatch=program.microbatch,
        active=steps.active if program.skips else None,
        record=record,
    )
    return (end[0], end[1]), kept


def _record(program: Program, state: State, segment: Segment) -> tuple[State, Any]:
    """Runs a segment; keeps its gradients, and the state before each block where it has several."""
    several = segment.weights.shape[0] > 1

    def block(state: State, steps: Segment):
        end, gradients = _run(program, state, steps, lambda step: step.gradient)
        return end, (state if several else None, gradients)

    return jax.lax.scan(block, state, segment)


def _walk_back(program: Program, tape: Any, state: State, segment: Segment, carry: Carry):
    starts, gradients = tape
    length, size = segment.weights.shape[1:]

    def back_over_block(carry: Carry, inputs):
        start, gradients, steps = inputs
        start = state if start is None else start

        def before(position: jax.Array) -> State:
            if length == 1:
                return start

            def update(i, state: State) -> State:
                gradient = jax.tree.map(lambda g: g[i], gradients)
                return apply_update(program.optimizer, *state, gradient)

            return jax.lax.fori_loop(0, position, update, start)

        def back_over_step(carry: Carry, inputs):
            position, gradient, batch, weights = inputs
            params, opt_state = before(position)
            of_params, of_floats, of_gradient, masked = pull_back_update(
                program.optimizer,
                params,
                opt_state,
                gradient,
                (carry.params, carry.floats),
                singular=program.singular,
                stacked=program.stacked,
            )
            of_params, slopes = second_order(
                program.loss,
                params,
                batch,
                weights,
                of_gradient,
                of_params,
                microbatch=program.microbatch,
                differentiation=program.differentiation,
                stacked=program.stacked,
            )
            probe = jax.tree.map(jnp.add, carry.probe, of_gradient)
            return Carry(of_params, of_floats, probe), (-slopes / size, masked)

        inputs = (jnp.arange(length), gradients, steps.batches, steps.weights)
        return jax.lax.scan(
            skipping(back_over_step, program.skips),
            carry,
            (steps.active, inputs) if program.skips else inputs,
            reverse=True,
        )

    carry, (scores, masked) = jax.lax.scan(
        back_over_block, carry, (starts, gradients, segment), reverse=True
    )
    scores = scores.reshape(-1, *scores.shape[2:])
    if program.mesh is not None:
        # Every process reads all scores, wherever the windows lie.
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        scores = jax.lax.with_sharding_constraint(scores, everywhere)
    return carry, scores, masked.reshape(-1)


@jax.jit
def finite(tree: PyTree) -> jax.Array:
    """Whether every leaf is finite throughout, a bool scalar."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
