"""Exact metagradients by an explicit adjoint of the inner loop.

Let step t take `g_t = grad_theta sum_i w_ti l_i(theta_t) / B`, then `(theta, moments)_{t+1} =
U(theta_t, moments_t, g_t)`, and let Phi be an outer metric of `theta_T`. With `a, mu` the
cotangents of `theta_{t+1}` and `moments_{t+1}` (at the end `a = grad Phi`, `mu = 0`), one backward
step is

    (a, mu, c)  <- VJP of U at step t applied to (a, mu)       c: cotangent of g_t
    (l_dot, Hc) <- JVP of theta -> (losses, g_t) along c       one evaluation gives both
    dPhi/dw_ti   = l_dot_i / B
    a           <- a + Hc                                      the Hessian is symmetric

No activation of the model outlives a step, and U may be any optax transformation. The mean of
`c_t / B` over insertion steps is the *probe*: one forward-mode product with it scores any window
(see `probe.py`).

Cost: one gradient and about 2.7 gradients' worth of arithmetic a step, and one gradient more for
every level of segments. Memory: `tape.py`. The derivatives: `optimizer.py` and `second_order.py`.
The compiled programs: `sweep.py`.

References:
  Engstrom et al., 2025, https://arxiv.org/abs/2503.13751 (metagradients, REPLAY).
  Kemaev et al., 2025, https://arxiv.org/abs/2505.00793 (forward over reverse in bilevel training).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.metagradient.divergence import explain
from metagrad_filter.metagradient.optimizer import is_float
from metagrad_filter.metagradient.plan import plan_sweep
from metagrad_filter.metagradient.sweep import (
    Carry,
    Program,
    Segment,
    State,
    advance,
    begin,
    finite,
    slots,
    sweep,
    sweep_whole,
)
from metagrad_filter.metagradient.tape import Tape, free_bytes
from metagrad_filter.types import Loss, Outer, PyTree

TapeKind = Literal["auto", "state", "gradient", "segments"]
Differentiation = Literal["forward_over_reverse", "reverse_over_reverse"]


@dataclass(frozen=True)
class Metagradients:
    """What one trajectory and its adjoint sweep yield. Dicts of these where `outer` was a dict.

    Attributes:
      phi: the outer metric at the end of the trajectory, scalar.
      scores: `(T, B)`, score = -dPhi/dw; higher means more worth training on.
      probe: pytree like params, float32 or wider; see `probe_scores`.
      params: parameters at the end of the trajectory.
      opt_state: optimizer state at the end of the trajectory.
      masked_coordinates: coordinates of the gradient that had no second moment at the first step
        and took cotangent zero; 0 for optimizers that do not divide by its root.
      tape: what the sweep kept; `str(tape)` says it in a sentence.
    """

    phi: Any
    scores: Any
    probe: Any
    params: PyTree
    opt_state: PyTree
    masked_coordinates: int
    tape: Tape


def metagradients(
    loss: Loss,
    outer: Outer | Mapping[str, Outer],
    params: PyTree,
    opt_state: PyTree,
    batches: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    weights: Any = None,
    microbatch: int | None = None,
    tape: TapeKind = "auto",
    levels: int | None = None,
    offload: bool | None = None,
    differentiation: Differentiation = "forward_over_reverse",
) -> Metagradients:
    """Scores every window of a trajectory by -dPhi/dw of its loss weight.

    The call compiles once per `(loss, outer, optimizer)` and shapes: pass the same function objects
    again and the compiled program is reused. Arrays may be sharded over a device mesh (see
    `metagrad_filter.sharding`): the computation follows them.

    Args:
      loss: `loss(params, batch) -> (B,)` floats, the loss of each window of the batch.
      outer: `outer(params) ->` scalar Phi, lower is better; or a dict of such functions, which
        share one trajectory and one sweep.
      params: where the trajectory starts; a pytree of floating-point arrays.
      opt_state: `optimizer.init(params)`, or the live (warm) moments. Prefer warm ones: from cold
        Adam moments the scores of a trajectory sum to zero by construction.
      batches: pytree of arrays with leading axes `(T, B, ...)`: one fresh batch per inner step.
      optimizer: any optax transformation. Where its update is not differentiable it is given its
        derivative almost everywhere: sign functions (Lion) have zero, integer state has none, and
        rounding to a narrower dtype is the identity.
      weights: `(T, B)` loss weights, default ones.
      microbatch: windows per gradient evaluation; memory falls, results do not change.
      tape: what the backward sweep keeps; results do not change. "state": parameters, moments and
        gradient of every step. "gradient": every gradient, optimizer updates are replayed.
        "segments": states some steps apart, between which the model runs again. "auto": the
        cheapest that fits half of the device's free memory; `result.tape` says which.
      levels: of "segments": 1, or 2 or 3 for hundreds of steps (less memory, one more forward pass
        a level). None for one, or for what "auto" needs.
      offload: whether the states of "segments", and the end of the trajectory, are kept in host
        memory. None leaves it to "auto".
      differentiation: "forward_over_reverse", or "reverse_over_reverse" for models that have no
        forward-mode rule.

    Returns:
      `Metagradients`, in the dtype of the losses (float32 unless jax runs in 64 bits). With narrow
      parameters (bfloat16) cotangents are float32 all the same.

    Raises:
      ConfigError: an argument is out of its domain.
      WindowError: `batches` or `weights` do not have the leading axes `(T, B)`.
      NonFiniteMetagradient: the trajectory or its adjoint left the finite numbers; names the step
        and, where there are some, the windows.

    Warns:
      RuntimeWarning: every score is exactly zero, as it is for an optimizer whose update is the
        sign of a mean of gradients.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> loss = lambda params, batch: (params - batch) ** 2
      >>> sgd = optax.sgd(0.1)
      >>> start = jnp.float32(0.0)
      >>> result = metagradients(loss, lambda params: (params - 1.0) ** 2, start, sgd.init(start),
      ...                        jnp.array([[1.0, -1.0]]), optimizer=sgd)
      >>> [round(float(s), 3) for s in result.scores[0]]
      [0.2, -0.2]

    References:
      Engstrom et al., 2025, https://arxiv.org/abs/2503.13751, section 3.
    """
    outers = dict(outer) if isinstance(outer, Mapping) else {"": outer}
    weights = _checked(params, batches, weights, outers, microbatch, differentiation)
    program, plan = plan_sweep(
        loss,
        outers,
        params,
        opt_state,
        len(weights),
        stacked=isinstance(outer, Mapping),
        optimizer=optimizer,
        microbatch=microbatch,
        tape=tape,
        levels=levels,
        offload=offload,
        differentiation=differentiation,
        free_bytes=free_bytes(params),
        mesh=_mesh(batches),
    )
    walk = _in_segments if plan.spans else _in_one
    end, phi, carry, scores, masked = walk(program, plan, (params, opt_state), batches, weights)
    probe = _mean_cotangent(carry.probe, weights.size)
    if not finite((phi, scores, probe)):
        raise explain(program, (params, opt_state), batches, weights, phi, scores, probe)
    _warn_of_zeros(scores)
    if program.stacked:
        names = list(outers)
        phi = {name: phi[i] for i, name in enumerate(names)}
        scores = {name: scores[:, i] for i, name in enumerate(names)}
        probe = {name: jax.tree.map(lambda x, i=i: x[i], probe) for i, name in enumerate(names)}
    return Metagradients(phi, scores, probe, *end, int(masked), plan)


def _in_one(program: Program, plan: Tape, state: State, batches: PyTree, weights: jax.Array):
    """The whole trajectory as one segment, in one program."""
    steps = len(weights)
    segment = _segment(plan, batches, weights, 0, slots(plan, steps))
    end, phi, carry, scores, masked = sweep_whole(state, segment, program=program)
    return end, phi, carry, scores[:steps], masked[0]


def _in_segments(program: Program, plan: Tape, state: State, batches: PyTree, weights: jax.Array):
    """Segment by segment, from states kept on the way; deeper levels keep states within those."""
    steps, swept = len(weights), plan.spans[-1]
    keep, fetch = (_to_host, _to_device) if plan.offload else (_as_is, _as_is)
    found: list[tuple[jax.Array, jax.Array]] = []

    def segment(start: int) -> Segment:
        return _segment(plan, batches, weights, start, swept)

    def climb(state: State, start: int, stop: int, span: int) -> tuple[list[State], State]:
        """Runs steps `start` to `stop`; returns the states `span` apart, and that at `stop`."""
        states = []
        for step in range(start, stop, swept):
            if (step - start) % span == 0:
                states.append(state if step == start else keep(state))
            state = advance(state, segment(step), program=program)
        return states, state

    def descend(state: State, start: int, stop: int, spans: tuple[int, ...], carry: Carry) -> Carry:
        if not spans or stop - start <= swept:
            carry, *of_steps = sweep(fetch(state), segment(start), carry, program=program)
            found.append((of_steps[0], of_steps[1]))
            return carry
        # The last stretch is climbed again from its own state.
        last = start + (stop - start - 1) // spans[0] * spans[0]
        states, end = climb(fetch(state), start, last, spans[0])
        return down([*states, keep(end)], start, stop, spans, carry)

    def down(states: list[State], start: int, stop: int, spans: tuple[int, ...], carry: Carry):
        while states:
            begins = start + (len(states) - 1) * spans[0]
            carry = descend(states.pop(), begins, min(begins + spans[0], stop), spans[1:], carry)
        return carry

    states, end = climb(state, 0, steps, plan.spans[0])
    phi, carry = begin(end, program=program)
    end = keep(end)
    carry = down(states, 0, steps, plan.spans, carry)
    scores = jnp.concatenate([scores for scores, _ in reversed(found)])
    return end, phi, carry, scores[:steps], found[-1][1][0]


def _segment(plan: Tape, batches: PyTree, weights: jax.Array, start: int, slots: int) -> Segment:
    """`slots` steps from `start` on, cut into blocks; beyond the end the last step is repeated."""
    steps, block = len(weights), plan.block
    blocks = -(-slots // block)
    index = np.arange(start, start + blocks * block)
    active = (index < steps) & (index < start + slots)
    whole = index[-1] < steps

    def cut(x: jax.Array) -> jax.Array:
        taken = x[start : start + blocks * block] if whole else x[np.minimum(index, steps - 1)]
        return jnp.reshape(taken, (blocks, block, *x.shape[1:]))

    return Segment(
        jax.tree.map(cut, batches), cut(weights), jnp.asarray(active.reshape(blocks, block))
    )


def _mesh(batches: PyTree) -> Mesh | None:
    """The mesh over which the batches are sharded, if they are."""
    for leaf in jax.tree.leaves(batches):
        sharding = getattr(leaf, "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if isinstance(sharding, NamedSharding) and isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None


def _as_is(state: State) -> State:
    return state


def _to_host(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), state
    )


def _to_device(state: State) -> State:
    def move(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.sharding.memory_kind != "pinned_host":
            return x
        kind = next(iter(x.sharding.addressable_devices)).default_memory().kind
        return jax.device_put(x, x.sharding.with_memory_kind(kind))

    return jax.tree.map(move, state)


@functools.partial(jax.jit, donate_argnums=0)
def _mean_cotangent(total: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: x / count, total)


def _warn_of_zeros(scores: jax.Array) -> None:
    if not scores.any():
        warnings.warn(
            "every score is exactly zero: the update of this optimizer has derivative zero (the "
            "sign function of Lion) or no window reaches the outer metric; measure with a smooth "
            "optimizer such as optax.adamw at the same parameters.",
            RuntimeWarning,
            stacklevel=3,
        )


def _checked(params, batches, weights, outers, microbatch, differentiation) -> jax.Array:
    """Validates the arguments of `metagradients`; returns the weights as an array."""
    if not outers:
        raise ConfigError("outer is an empty dict; pass at least one outer metric.")
    if differentiation not in ("forward_over_reverse", "reverse_over_reverse"):
        raise ConfigError(
            f"differentiation={differentiation!r}; expected 'forward_over_reverse' or "
            "'reverse_over_reverse'."
        )
    whole = isinstance(microbatch, int) and not isinstance(microbatch, bool)
    if microbatch is not None and not (whole and microbatch >= 1):
        raise ConfigError(f"microbatch={microbatch!r}; expected a positive int or None.")
    for path, leaf in jax.tree.leaves_with_path(params):
        if not is_float(leaf):
            raise ConfigError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.asarray(leaf).dtype}; every "
                "parameter must be floating point (keep integer state inside the loss)."
            )
    axes = {jnp.shape(x)[:2] for x in jax.tree.leaves(batches)}
    if len(axes) != 1 or len(lead := next(iter(axes))) != 2 or 0 in lead:
        raise WindowError(
            f"batches have the leading axes {sorted(axes)}; expected the same non-empty (T, B) in "
            "every array: one batch of B windows for each of T steps."
        )
    if weights is None:
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
        return jnp.ones(lead, dtype)
    weights = jnp.asarray(weights)
    if weights.shape != lead or not is_float(weights):
        raise WindowError(
            f"weights are {weights.dtype}{list(weights.shape)}; expected floats of shape "
            f"{list(lead)} like the batches."
        )
    return weights
