"""Exact metagradients by an explicit adjoint of the inner loop.

Let step t take `g_t = grad_theta sum_i w_ti l_i(theta_t) / B`, then `(theta, moments)_{t+1} =
U(theta_t, moments_t, g_t)`, and let Phi be an outer metric of `theta_T`. With `a, mu` the
cotangents of `theta_{t+1}` and `moments_{t+1}` (at the end `a = grad Phi`, `mu = 0`), one backward
step is

    (a, mu, c)  <- VJP of U at step t applied to (a, mu)       c: cotangent of g_t
    (l_dot, Hc) <- JVP of theta -> (losses, g_t) along c       one evaluation gives both
    dPhi/dw_ti   = l_dot_i / B
    a           <- a + Hc                                      the Hessian is symmetric

No tape of the model's activations outlives a step, and U may be any optax transformation. The mean
of `c_t / B` over insertion steps is the *probe*: one forward-mode product with it scores any window
(see `probe.py`).

Cost: one gradient and about 2.7 gradients' worth of arithmetic a step. Memory: the tape.

References:
  Engstrom et al., 2025, https://arxiv.org/abs/2503.13751 (metagradients, REPLAY).
  Kemaev et al., 2025, https://arxiv.org/abs/2505.00793 (forward over reverse in bilevel training).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient.optimizer import (
    is_float,
    pull_back_update,
    singular_moments,
    split_floats,
)
from metagrad_filter.metagradient.trajectory import Tape, in_pieces, run
from metagrad_filter.types import Loss, Outer, PyTree

TapeKind = Literal["auto", "state", "gradient", "segments"]
Differentiation = Literal["forward_over_reverse", "reverse_over_reverse"]

_STATE_TAPE_BYTES = 1 << 30  # what tape="auto" spends before it keeps gradients only


@dataclass(frozen=True)
class Metagradients:
    """What one trajectory and its adjoint sweep yield. Dicts of these where `outer` was a dict.

    Attributes:
      phi: the outer metric at the end of the trajectory, scalar.
      scores: `(T, B)`, score = -dPhi/dw; higher means more worth training on.
      probe: pytree like params; see `probe_scores`.
      params: parameters at the end of the trajectory.
      opt_state: optimizer state at the end of the trajectory.
      masked_coordinates: coordinates of the gradient that had no second moment at the first step
        and took cotangent zero; 0 for optimizers that do not divide by its root.
      tape: which tape the sweep kept.
    """

    phi: Any
    scores: Any
    probe: Any
    params: PyTree
    opt_state: PyTree
    masked_coordinates: int
    tape: str


class _Program(NamedTuple):
    """Everything about a sweep that is fixed when it is compiled."""

    loss: Loss
    outers: tuple[Outer, ...]
    stacked: bool
    optimizer: optax.GradientTransformation
    microbatch: int | None
    tape: str
    differentiation: str
    singular: tuple[bool, ...]


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
    differentiation: Differentiation = "forward_over_reverse",
) -> Metagradients:
    """Scores every window of a trajectory by -dPhi/dw of its loss weight.

    The call compiles once per `(loss, outer, optimizer)` and shapes: pass the same function objects
    again and the compiled program is reused.

    Args:
      loss: `loss(params, batch) -> (B,)` floats, the loss of each window of the batch.
      outer: `outer(params) ->` scalar Phi, lower is better; or a dict of such functions, which
        share one trajectory and one sweep.
      params: where the trajectory starts; a pytree of floating-point arrays.
      opt_state: `optimizer.init(params)`, or the live (warm) moments. Prefer warm ones: from cold
        Adam moments the scores of a trajectory sum to zero by construction.
      batches: pytree of arrays with leading axes `(T, B, ...)`: one fresh batch per inner step.
      optimizer: any optax transformation whose update is differentiable.
      weights: `(T, B)` loss weights, default ones.
      microbatch: windows per gradient evaluation; memory falls, results do not change.
      tape: what the backward sweep keeps. "state": parameters, moments and gradient of every step.
        "gradient": every gradient and the state of every sqrt(T)-th step, between which optimizer
        steps are replayed without the model. "segments": the state of every sqrt(T)-th step only,
        the model is evaluated again. "auto": "state" up to 1 GiB, then "gradient".
      differentiation: "forward_over_reverse", or "reverse_over_reverse" for models that have no
        forward-mode rule.

    Returns:
      `Metagradients`, in the dtype of the losses (float32 unless jax runs in 64 bits).

    Raises:
      ConfigError: an argument is out of its domain.
      WindowError: `batches` or `weights` do not have the leading axes `(T, B)`.
      NonFiniteMetagradient: the trajectory or its adjoint left the finite numbers.

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
    weights = _checked(params, batches, weights, outers, microbatch, tape, differentiation)
    kind = _choose_tape(params, opt_state, len(weights)) if tape == "auto" else tape
    program = _Program(
        loss=loss,
        outers=tuple(outers.values()),
        stacked=isinstance(outer, Mapping),
        optimizer=optimizer,
        microbatch=microbatch,
        tape=kind,
        differentiation=differentiation,
        singular=singular_moments(optimizer, params, opt_state),
    )
    phi, scores, probe, end, end_state, masked = _sweep(
        params, opt_state, batches, weights, program=program
    )
    _check_finite(np.asarray(phi), np.asarray(scores), probe)
    if program.stacked:
        names = list(outers)
        phi = {name: phi[i] for i, name in enumerate(names)}
        scores = {name: scores[i] for i, name in enumerate(names)}
        probe = {name: jax.tree.map(lambda x, i=i: x[i], probe) for i, name in enumerate(names)}
    return Metagradients(phi, scores, probe, end, end_state, int(masked), kind)


@functools.partial(jax.jit, static_argnames="program")
def _sweep(params, opt_state, batches, weights, *, program: _Program):
    steps, size = weights.shape

    def forward(state, batches, weights, **options):
        params, opt_state = state
        return run(
            program.loss,
            program.optimizer,
            params,
            opt_state,
            batches,
            weights,
            microbatch=program.microbatch,
            **options,
        )

    # Forward: segments of `span` steps; the state tape is one segment that keeps every step.
    span = steps if program.tape == "state" else math.ceil(math.sqrt(steps))
    whole = steps // span * span

    def segment(carry, inputs):
        start = carry
        record = (lambda t: t) if program.tape == "state" else (lambda t: t.gradient)
        keep = None if program.tape == "segments" else record
        end, end_state, kept = forward(carry, *inputs, record=keep)
        return (end, end_state), (None if program.tape == "state" else start, kept)

    head = jax.tree.map(
        lambda x: x[:whole].reshape(whole // span, span, *x.shape[1:]), (batches, weights)
    )
    tail = jax.tree.map(lambda x: x[whole:], (batches, weights))
    state, head_tape = jax.lax.scan(segment, (params, opt_state), head)
    if whole < steps:
        state, tail_tape = segment(state, tail)
    end, end_state = state

    # Backward: the cotangent of the parameters starts as grad Phi, that of the moments as zero.
    phis, lams = zip(*(jax.value_and_grad(outer)(end) for outer in program.outers))
    phi = jnp.stack(phis)
    lam = jax.tree.map(lambda *x: jnp.stack(x), *lams)
    if not program.stacked:
        phi, lam = phi[0], jax.tree.map(lambda x: x[0], lam)
    lead = (len(phis),) if program.stacked else ()
    floats = split_floats(end_state)[0]
    mu = [jnp.zeros(lead + f.shape, f.dtype) for f in floats]
    carry = (lam, mu, jax.tree.map(jnp.zeros_like, lam), jnp.int32(0))

    def step(carry, inputs):
        lam, mu, total, _ = carry
        tape, batch, w = inputs
        lam, mu, cotangent, masked = pull_back_update(
            program.optimizer,
            tape.params,
            tape.opt_state,
            tape.gradient,
            (lam, mu),
            singular=program.singular,
            stacked=program.stacked,
        )
        products, slopes = _second_order(program, tape.params, batch, w, cotangent)
        lam = jax.tree.map(jnp.add, lam, products)
        total = jax.tree.map(jnp.add, total, cotangent)
        return (lam, mu, total, masked), -slopes / size

    def back(carry, inputs):
        (anchor, kept), (batches, weights) = inputs
        if program.tape == "state":
            tape: Tape = kept
        else:
            tape = forward(anchor, batches, weights, gradients=kept, record=lambda t: t)[2]
        return jax.lax.scan(step, carry, (tape, batches, weights), reverse=True)

    if whole < steps:
        carry, tail_scores = back(carry, (tail_tape, tail))
    carry, scores = jax.lax.scan(back, carry, (head_tape, head), reverse=True)
    scores = scores.reshape(whole, *scores.shape[2:])
    if whole < steps:
        scores = jnp.concatenate([scores, tail_scores])
    if program.stacked:
        scores = jnp.moveaxis(scores, 1, 0)
    _, _, total, masked = carry
    probe = jax.tree.map(lambda x: x / (steps * size), total)
    return phi, scores, probe, end, end_state, masked


def _second_order(program: _Program, params, batch, weights, cotangent):
    """Hessian of the weighted loss times the cotangent, and each window's <grad loss, cotangent>.

    Returns the product (like `cotangent`) and slopes `(B,)`, with a leading axis of targets where
    there are several.
    """
    loss, size = program.loss, weights.shape[0]

    def objective(p, x, w):
        losses = loss(p, x)
        return jnp.sum(w * losses) / size, losses

    def forward_over_reverse(x, w, c):
        def gradient(p):
            (_, losses), g = jax.value_and_grad(objective, has_aux=True)(p, x, w)
            return losses, g

        _, (slopes, product) = jax.jvp(gradient, (params,), (c,))
        return product, slopes

    def reverse_over_reverse(x, w, c):
        def inner(p, w):
            g = jax.grad(lambda p: objective(p, x, w)[0])(p)
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, g, c)))

        product, slopes = jax.grad(inner, argnums=(0, 1))(params, w)
        return product, slopes * size

    modes = {
        "forward_over_reverse": forward_over_reverse,
        "reverse_over_reverse": reverse_over_reverse,
    }
    along = modes[program.differentiation]

    def piece(x, w):
        if program.stacked:
            return jax.vmap(lambda c: along(x, w, c))(cotangent)
        return along(x, w, cotangent)

    if program.microbatch is None or program.microbatch >= size:
        return piece(batch, weights)

    def accumulate(total, inputs):
        product, slopes = piece(*inputs)
        return jax.tree.map(jnp.add, total, product), slopes

    zeros = jax.tree.map(jnp.zeros_like, cotangent)
    product, slopes = jax.lax.scan(accumulate, zeros, in_pieces(batch, weights, program.microbatch))
    slopes = jnp.moveaxis(slopes, 0, -2)
    return product, slopes.reshape(*slopes.shape[:-2], -1)[..., :size]


def _choose_tape(params: PyTree, opt_state: PyTree, steps: int) -> str:
    leaves = jax.tree.leaves((params, params, opt_state))
    return "state" if steps * sum(x.nbytes for x in leaves) <= _STATE_TAPE_BYTES else "gradient"


def _checked(params, batches, weights, outers, microbatch, tape, differentiation) -> jax.Array:
    """Validates the arguments of `metagradients`; returns the weights as an array."""
    if not outers:
        raise ConfigError("outer is an empty dict; pass at least one outer metric.")
    if tape not in ("auto", "state", "gradient", "segments"):
        raise ConfigError(f"tape={tape!r}; expected 'auto', 'state', 'gradient' or 'segments'.")
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
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return jnp.ones(lead, dtype)
    weights = jnp.asarray(weights)
    if weights.shape != lead or not is_float(weights):
        raise WindowError(
            f"weights are {weights.dtype}{list(weights.shape)}; expected floats of shape "
            f"{list(lead)} like the batches."
        )
    return weights


def _check_finite(phi: np.ndarray, scores: np.ndarray, probe: PyTree) -> None:
    if not np.isfinite(phi).all():
        raise NonFiniteMetagradient(
            f"the outer metric is {phi} at the end of the trajectory; the inner loop diverged: "
            "lower its learning rate or check the batches."
        )
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        step, window = (int(i) for i in bad[-1][-2:])
        raise NonFiniteMetagradient(
            f"{len(bad)} of {scores.size} scores are not finite, the last at step {step}, window "
            f"{window}; look at that batch (a gradient of exactly zero has no derivative under "
            "clipping by norm), or add eps_root to the optimizer."
        )
    for path, leaf in jax.tree.leaves_with_path(probe):
        if not np.isfinite(np.asarray(leaf)).all():
            raise NonFiniteMetagradient(
                f"the probe is not finite in params{jax.tree_util.keystr(path)} although the "
                "scores are; add eps_root to the optimizer."
            )
