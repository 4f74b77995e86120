"""Leaves of a checkpoint, found by name: which of them are the proxy's parameters and moments.

Orbax stores optax states as dicts and lists, and jobs put collections and items around their trees,
so structures cannot be compared; names, shapes and dtypes can. Everything here works on metadata,
as pure functions; nothing is read.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from metagrad_filter.errors import CalibrationFailed, ConfigError
from metagrad_filter.types import PyTree

Names = tuple[str, ...]
"""Path of a leaf or node, from the root of a checkpoint."""


def match_params(
    saved: dict[Names, Any], where: Names, params: PyTree, path: epath.Path
) -> list[tuple[Names, jax.ShapeDtypeStruct]]:
    """Saved names of the parameters, in their order, and what each has to be."""
    matched = []
    for names, leaf in named(params):
        like = like_of(leaf)
        held = saved.get(where + names)
        if _kind(held) != (like.shape, like.dtype):
            raise CalibrationFailed(
                f"{path} holds {_shown(held)} at {dotted(where + names)}, but the proxy's "
                f"parameter {dotted(names)} is {_shown(like)}; name the checkpoints of the same "
                "model, or say where its parameters lie."
            )
        matched.append((where + names, like))
    known = {names for names, _ in matched}
    more = [n for n in saved if n[: len(where)] == where and n not in known]
    if more:
        raise CalibrationFailed(
            f"{path} holds {dotted(more[0])} ({len(more)} more leaves than the proxy's "
            "parameters); name the checkpoints of the same model, or say where its parameters lie."
        )
    return matched


def match_moments(
    saved: dict[Names, Any],
    at: Names,
    where: Names,
    params: PyTree,
    template: PyTree,
    path: epath.Path,
) -> list[tuple[Names, jax.ShapeDtypeStruct]]:
    """Saved names of the state's leaves, in order; `()` for a count that was not saved."""
    owned = {names: like_of(leaf) for names, leaf in named(params)}
    # Jobs that keep parameters under a collection (flax's `params`) have it in the moments too.
    collections = [where[len(where) - i :] for i in range(len(where) + 1)]
    matched = []
    for names, leaf in named(template):
        ends = [names[i:] for i in range(len(names)) if names[i:] in owned]
        owner = next((end for end in ends if owned[end].shape == leaf.shape), ())
        holder = names[: len(names) - len(owner)]
        tried = [(*at, *holder, *c, *owner) for c in (collections if owner else [()])]
        found = next((n for n in tried if n in saved), ())
        if not found and (owner or leaf.ndim):
            raise CalibrationFailed(
                f"{path} holds no {dotted(tried[0])}, which the proxy's optimizer keeps; below "
                f"{dotted(at)} lie {listed(outline(saved, at))}. Pass the optimizer factory of "
                "the training job, or say where its state lies."
            )
        if found and _kind(saved[found])[0] != leaf.shape:
            raise CalibrationFailed(
                f"{path} holds {_shown(saved[found])} at {dotted(found)}, but the proxy's "
                f"optimizer keeps {_shown(leaf)}; name the checkpoints of the same model."
            )
        sharding = owned[owner].sharding if owner else None
        matched.append((found, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)))
    return matched


def like_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a parameter, and its sharding where it lies on several devices."""
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding if spread else None)


def _kind(leaf: Any) -> tuple[Any, Any]:
    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
    return (None if leaf is None else tuple(shape)), (None if dtype is None else np.dtype(dtype))


def _shown(leaf: Any) -> str:
    shape, dtype = _kind(leaf)
    return "nothing" if shape is None else f"{dtype}{list(shape)}"


def resolve(saved: dict[Names, Any], field: str, text: str, path: epath.Path) -> Names:
    """The node that a user's path names, with or without the name of its item."""
    asked = tuple(part for part in re.split(r"[./]", text) if part)
    items = {names[:1] for names in saved}
    for names in (asked, *sorted(item + asked for item in items)):
        if any(n[: len(names)] == names for n in saved):
            return names
    raise ConfigError(
        f"{field}={text!r} names nothing in {path}, which holds {listed(outline(saved))}."
    )


def outline(saved: dict[Names, Any], at: Names = ()) -> list[Names]:
    """Nodes near the root, for messages."""
    below = [names for names in saved if names[: len(at)] == at]
    return sorted({names[: len(at) + 2] for names in below})


def listed(nodes: Any) -> str:
    """Nodes for a message, the first twelve of them."""
    shown = [dotted(names) for names in sorted(nodes)]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def dotted(names: Names) -> str:
    """A path as users write it."""
    return ".".join(names) or "the root"


def named(tree: PyTree) -> list[tuple[Names, Any]]:
    """Leaves with their names, in the order of `jax.tree.leaves`."""
    return [(names_of(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def names_of(path: Any) -> Names:
    """A tree path of jax as names, which are the same for dicts and named tuples."""
    names = tuple(str(ocp.utils.get_key_name(key)) for key in path)
    # nnx saves a variable as a node of its own, whose only leaf is called `value`.
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names
