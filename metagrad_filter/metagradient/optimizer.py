"""One optimizer update and its derivative, for any optax transformation.

An update maps `(params, moments, gradient)` to `(params, moments)`. Its vector-Jacobian product is
taken by jax, so chains, clipping, schedules, masks and accumulation need no rule of their own. What
plain autodiff gets wrong, or cannot know, is handled here:

* Integer state (step counts) has no derivative and is carried along. Sign functions (Lion) have
  derivative zero, and rounding to a narrower dtype has derivative one.
* Where a second moment vanishes (an embedding row that no batch has touched) the root in Adam has
  an infinite slope, autodiff computes `inf * 0`, and the NaN spreads through gradient clipping into
  every coordinate. Such a coordinate takes cotangent zero instead. In-batch metagradients do not
  change by this, for the coordinate received no gradient.
* Narrow parameters and moments (bfloat16) are widened before they are differentiated, so that
  cotangents are float32. A moment that the optimizer itself stores narrow (`mu_dtype`) rounds its
  cotangent once a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagrad_filter.errors import ConfigError
from metagrad_filter.types import PyTree

Leaves = list[jax.Array]

_VANISHED = 1e-25  # below this the slope of an inverse root, v ** -1.5, leaves float32
_HARMLESS = 1e-20  # stands in for a vanished moment: finite slopes, no weight in a mean of moments
_PROBED_ROWS = 128  # dimensions up to which optax.adafactor decides whether to factor a moment


def apply_update(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree, gradient: PyTree
) -> tuple[PyTree, PyTree]:
    """Takes one optimizer step; returns the new parameters and the new state."""
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def is_float(leaf: Any) -> bool:
    """Whether an array, a scalar or a `jax.ShapeDtypeStruct` is floating point."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def widened(tree: PyTree) -> PyTree:
    """Floating-point leaves in float32 or wider; other leaves as they are."""

    def widen(x: Any) -> Any:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float(x) else x

    return jax.tree.map(widen, tree)


def split_floats(opt_state: PyTree) -> tuple[Leaves, Callable[[Leaves], PyTree]]:
    """Splits a state into its floating-point leaves and a function that puts them back."""
    leaves, treedef = jax.tree.flatten(opt_state)

    def join(floats: Leaves) -> PyTree:
        remaining = iter(floats)
        return treedef.unflatten([next(remaining) if is_float(x) else x for x in leaves])

    return [x for x in leaves if is_float(x)], join


def owners(params: PyTree, opt_state: PyTree) -> tuple[int, ...]:
    """For each float leaf of the state, the index of the parameter it belongs to, or -1.

    A moment belongs to the parameter whose tree path ends the moment's own path and whose shape it
    shares: `state[0].nu['wte']` belongs to `params['wte']`. This needs no knowledge of the
    optimizer and survives chains, masks and `multi_transform`.
    """
    named = [(path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(params)]
    found = []
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        if not is_float(leaf):
            continue
        matches = [
            (len(name), i)
            for i, (name, shape) in enumerate(named)
            if path[len(path) - len(name) :] == name and shape == jnp.shape(leaf)
        ]
        found.append(max(matches)[1] if matches else -1)
    return tuple(found)


def _float_paths(tree: PyTree) -> list[Any]:
    return [path for path, leaf in jax.tree.leaves_with_path(tree) if is_float(leaf)]


def _holder(path: tuple[Any, ...], names: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Path of the state that holds a moment: `state[0].nu['wte']` is held by `state[0]`."""
    of_param = max((len(n) for n in names if path[len(path) - len(n) :] == n), default=0)
    return path[: len(path) - of_param - 1]


def singular_moments(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree
) -> tuple[bool, ...]:
    """For each float leaf of the state: is the update's slope in it infinite at zero?

    True for Adam's and RMSProp's second moment with `eps_root=0`, False for momentum. Found by
    differentiating one update from a cold state with a gradient that is zero in one coordinate of
    every parameter, so that no optimizer has to be known by name.

    Raises:
      ConfigError: `opt_state` is not a state of this optimizer for these parameters.
    """
    try:
        cold = jax.eval_shape(optimizer.init, params)
    except Exception as error:
        raise ConfigError(
            f"optimizer.init(params) failed with {type(error).__name__}: {error}; pass the optax "
            "transformation and the parameters that the live training uses."
        ) from error
    seen, expected = jax.tree.structure(opt_state), jax.tree.structure(cold)
    if seen != expected:
        raise ConfigError(
            f"opt_state has the structure {seen}, but optimizer.init(params) has {expected}; pass "
            "the state of this very optimizer (a schedule adds a step count to the state)."
        )
    for (path, leaf), like in zip(jax.tree.leaves_with_path(opt_state), jax.tree.leaves(cold)):
        if jnp.shape(leaf) != like.shape:
            raise ConfigError(
                f"opt_state{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but "
                f"optimizer.init(params) has {like.shape}; pass the state of these parameters."
            )
    slopes = _slopes_at_zero(optimizer, *_sample(optimizer, params, cold))
    # A scalar without an owner is no moment but an injected hyperparameter, such as eps_root = 0.
    known = zip(owners(params, opt_state), split_floats(opt_state)[0])
    moments = [owner >= 0 or jnp.ndim(leaf) > 0 for owner, leaf in known]
    return tuple(bool(slope) and moment for slope, moment in zip(slopes, moments))


def _sample(optimizer, params: PyTree, cold: PyTree) -> tuple[PyTree, PyTree]:
    """Small parameters that the optimizer treats as it treats `params`, and a gradient with zeros.

    The gradient is zero in the first row, column, ... of every parameter, as it is for a token that
    no batch holds.
    """

    def corner(param: Any) -> jax.Array:
        return jnp.ones(_corner(param), jnp.promote_types(param.dtype, jnp.float32))

    def zero_edges(param: jax.Array) -> jax.Array:
        if param.size == 1:
            return jnp.zeros_like(param)
        inner = [jnp.arange(size) > 0 if size > 1 else jnp.ones(1, bool) for size in param.shape]
        return functools.reduce(
            lambda keep, axis: keep[..., None] & axis, inner, jnp.ones((), bool)
        ).astype(param.dtype)

    small = jax.tree.map(corner, params)
    like = jax.eval_shape(optimizer.init, small)
    same = jax.tree.structure(like) == jax.tree.structure(cold)
    if not same or jax.tree.map(jnp.shape, like) != jax.tree.map(_corner, cold):
        small = widened(params)  # the optimizer looks at sizes: take the real ones
    return small, jax.tree.map(zero_edges, small)


def _corner(x: Any) -> tuple[int, ...]:
    return tuple(min(size, _PROBED_ROWS) for size in jnp.shape(x))


@functools.partial(jax.jit, static_argnames="optimizer")
def _slopes_at_zero(optimizer, params, gradient) -> list[jax.Array]:
    """Which float leaves of a cold state have an infinite slope and do not know the sign of g."""
    floats, join = split_floats(optimizer.init(params))
    new, pull_back = jax.vjp(
        lambda f: apply_update(optimizer, params, join(f), gradient)[0], floats
    )
    (slopes,) = pull_back(jax.tree.map(jnp.ones_like, new))

    def after(gradient: PyTree) -> Leaves:
        return split_floats(apply_update(optimizer, params, join(floats), gradient)[1])[0]

    # What accumulates gradients, to be squared later, has the slope but is no second moment.
    mirrored = zip(after(gradient), after(jax.tree.map(jnp.negative, gradient)))
    even = [(plus == minus).all() for plus, minus in mirrored]
    return [~jnp.isfinite(slope).all() & e for slope, e in zip(slopes, even)]


def pull_back_update(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    gradient: PyTree,
    cotangents: tuple[PyTree, Leaves],
    *,
    singular: tuple[bool, ...],
    stacked: bool,
) -> tuple[PyTree, Leaves, PyTree, jax.Array]:
    """Pulls cotangents of the new parameters and moments back through one update.

    Args:
      optimizer: the transformation that made the step.
      params, opt_state, gradient: the point at which the step was made.
      cotangents: of the new parameters, and of the new float leaves of the state, in float32 or
        wider; with a leading axis of targets if `stacked`.
      singular: `singular_moments` of the optimizer.
      stacked: whether the cotangents carry a leading axis.

    Returns:
      Cotangents of the parameters, of the float leaves and of the gradient, in float32 or wider,
      and the number of coordinates (int32) whose gradient took cotangent zero because their second
      moment has vanished.
    """
    floats, join = split_floats(opt_state)

    def update(p: PyTree, f: Leaves, g: PyTree) -> tuple[PyTree, Leaves]:
        new_params, new_state = apply_update(optimizer, p, join(f), g)
        return new_params, split_floats(new_state)[0]

    params, gradient = widened(params), widened(gradient)
    floats = _widened_floats(update, params, floats, gradient)
    leaves, treedef = jax.tree.flatten(gradient)
    untouched = [jnp.zeros(jnp.shape(g), bool) for g in leaves]
    dead = [jnp.zeros(jnp.shape(f), bool) for f in floats]
    if any(singular):
        _, after = update(params, floats, gradient)
        # An accumulating optimizer leaves its moments alone between steps, and takes no root then.
        took_root = functools.reduce(
            jnp.logical_or,
            [(a != f).any() for a, f, s in zip(after, floats, singular) if s],
        )
        for i, axes in enumerate(_owned_axes(params, opt_state)):
            if singular[i]:
                dead[i] = (jnp.abs(floats[i]) <= _VANISHED) & (jnp.abs(after[i]) <= _VANISHED)
                floats[i] = jnp.where(dead[i], jnp.asarray(_HARMLESS, floats[i].dtype), floats[i])
                if axes is not None:
                    owner, missing = axes
                    untouched[owner] |= jnp.expand_dims(dead[i], missing) & took_root

    new, pull_back = jax.vjp(update, params, floats, gradient)

    def mask(cotangents: tuple[PyTree, Leaves]) -> tuple[PyTree, Leaves, PyTree]:
        narrowed = jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, new)
        of_params, of_floats, of_gradient = pull_back(narrowed)
        of_floats = [jnp.where(d, 0, c) for d, c in zip(dead, widened(of_floats))]
        of_leaves = [
            jnp.where(u, 0, c) for u, c in zip(untouched, treedef.flatten_up_to(of_gradient))
        ]
        return of_params, of_floats, treedef.unflatten(of_leaves)

    pulled = jax.vmap(mask)(cotangents) if stacked else mask(cotangents)
    count = sum((jnp.sum(u, dtype=jnp.int32) for u in untouched), jnp.int32(0))
    return *pulled, count


def _widened_floats(update, params: PyTree, floats: Leaves, gradient: PyTree) -> Leaves:
    """Widens the float leaves of a state, except those that the optimizer itself stores narrow."""
    wide = widened(floats)
    try:
        _, after = jax.eval_shape(update, params, wide, gradient)
    except TypeError:
        # Both branches of an accumulating optimizer must agree in dtype with the stored moments.
        return floats
    return [w if a.dtype == w.dtype else f for f, w, a in zip(floats, wide, after)]


def _owned_axes(params: PyTree, opt_state: PyTree) -> list[tuple[int, tuple[int, ...]] | None]:
    """For each float leaf of the state: its parameter and the axes it lacks of it, or None.

    Adafactor keeps the means of the squared gradient over one axis, `v_row` over the last of the
    two largest axes and `v_col` over the other (optax.scale_by_factored_rms).
    """
    named = list(jax.tree.leaves_with_path(params))
    found: list[tuple[int, tuple[int, ...]] | None] = []
    moments = [
        (path, jnp.shape(x)) for path, x in jax.tree.leaves_with_path(opt_state) if is_float(x)
    ]
    for owner, (path, shape) in zip(owners(params, opt_state), moments):
        match = (owner, ()) if owner >= 0 else None
        for i, (name, param) in enumerate(named):
            whole = jnp.shape(param)
            lacking = [a for a in range(len(whole)) if whole[:a] + whole[a + 1 :] == shape]
            if match is None and lacking and path[len(path) - len(name) :] == name:
                rows = "v_row" in jax.tree_util.keystr(path)
                match = (i, (lacking[-1] if rows else lacking[0],))
        found.append(match)
    return found


def warm_state(
    optimizer: optax.GradientTransformation, params: PyTree, live_state: PyTree
) -> PyTree:
    """Moves the moments of a live state, and their step count, into `optimizer`'s own state.

    The inner loop runs at a learning rate of its own, and optax states differ in structure between
    a constant and a scheduled rate. Float leaves that agree in tree path and shape are copied, and
    integers that stand beside them (Adam's bias-correction count); the step count of a schedule
    stands alone and starts anew, as the schedule does.

    Raises:
      ConfigError: no floating-point leaf could be taken over although the optimizer has moments.
    """
    live = dict(jax.tree.leaves_with_path(live_state))
    fresh = optimizer.init(params)
    fits = {
        path
        for path, leaf in jax.tree.leaves_with_path(fresh)
        if path in live and jnp.shape(live[path]) == jnp.shape(leaf)
    }
    # A lone scalar without an owner is an injected hyperparameter: the live learning rate itself.
    moments = {
        path
        for path, owner in zip(_float_paths(fresh), owners(params, fresh))
        if path in fits and (owner >= 0 or jnp.ndim(live[path]) > 0)
    }
    names = [name for name, _ in jax.tree.leaves_with_path(params)]
    states = {_holder(path, names) for path in moments}
    if not moments and split_floats(fresh)[0]:
        raise ConfigError(
            "no moment of the live optimizer state fits the inner optimizer; pass the optimizer "
            "factory that the live training uses (for instance functools.partial(optax.adamw, "
            "b2=0.95)) together with its state."
        )

    def take(path, leaf):
        count_of_moments = not is_float(leaf) and path[:-1] in states
        if path not in fits or not (path in moments or count_of_moments):
            return leaf
        return jnp.asarray(live[path], jnp.asarray(leaf).dtype)

    return jax.tree.map_with_path(take, fresh)
