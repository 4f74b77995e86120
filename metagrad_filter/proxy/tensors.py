"""Named tensors of a checkpoint as the nested parameters of a decoder, and back.

Answers "is this file exactly the model that its configuration describes?". Every expected tensor
must be there with the expected shape and finite values, and every tensor that is there must be
expected; a difference is named. Tensors are read one at a time, so memory peaks at the parameters
and one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.proxy.families import Family, family_of
from metagrad_filter.proxy.loss import AnyConfig, param_shapes
from metagrad_filter.types import PyTree

PARAM_DTYPES = ("float32", "bfloat16")
_OUTPUT = "lm_head.weight"
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def assemble(
    config: AnyConfig,
    names: Iterable[str],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str,
    where: str,
) -> PyTree:
    """Parameters of a decoder from a checkpoint's tensors.

    Args:
      config: of either family.
      names: what the checkpoint holds, with or without the family's prefix.
      read: name -> tensor as stored.
      dtype: of the parameters, "float32" or "bfloat16".
      where: what messages call the checkpoint.

    Returns:
      The tree of `init_decoder`.

    Raises:
      ConfigError: `dtype` is another.
      DataError: tensors are missing, unexpected, of another shape, of another type than floating
        point, or not finite.
    """
    if dtype not in PARAM_DTYPES:
        raise ConfigError(f"dtype={dtype!r}; expected one of {sorted(PARAM_DTYPES)}.")
    family = family_of(config)
    stored = _stored(family, names, where)
    if len(stored) < config.layer_count:
        # Before anything is sized by a number that the file merely claims.
        raise DataError(
            f"{where} holds {len(stored)} tensors for {config.layer_count} layers; expected "
            "several a layer. The configuration belongs to another checkpoint."
        )
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    expected = {_name(path): (_transposed(family, path), leaf.shape) for path, leaf in leaves}
    extra = sorted(stored.keys() - expected.keys())
    if config.tie_word_embeddings and _OUTPUT in extra:
        extra.remove(_OUTPUT)
        _check_tied(family, stored, read, where)
    missing = sorted(expected.keys() - stored.keys())
    if missing or extra:
        raise DataError(
            f"{where} does not hold the tensors of its configuration: missing {_some(missing)}; "
            f"unexpected {_some(extra)}. Use the config.json that belongs to it."
        )
    return jax.tree.unflatten(
        tree,
        [
            jnp.asarray(_checked(read(stored[name]), name, shape, flip, where), dtype)
            for name, (flip, shape) in expected.items()
        ],
    )


def named_tensors(config: AnyConfig, params: PyTree) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint from parameters; the inverse of `assemble`, byte for byte.

    Args:
      config: of either family.
      params: the tree of `init_decoder`.

    Raises:
      ConfigError: the parameters are not those of `config`.
    """
    family = family_of(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    if jax.tree.structure(params) != tree:
        raise ConfigError(
            f"params are a tree of {jax.tree.structure(params).num_leaves} arrays that is not the "
            f"one of this {type(config).__name__} ({tree.num_leaves} arrays); pass the "
            "configuration that they were made with."
        )
    tensors = {}
    for (path, leaf), value in zip(leaves, jax.tree.leaves(params)):
        name = _name(path)
        if value.shape != leaf.shape:
            raise ConfigError(
                f"the parameter {name} has shape {value.shape}; its configuration says "
                f"{leaf.shape}. Pass the configuration that it was made with."
            )
        array = np.asarray(value)
        array = array.T if _transposed(family, path) else array
        full = name if name == _OUTPUT else f"{family.prefix}.{name}"
        tensors[full] = np.ascontiguousarray(array)
    return tensors


def _stored(family: Family, names: Iterable[str], where: str) -> dict[str, str]:
    """Name without prefix -> name in the file, buffers left out."""
    stored: dict[str, str] = {}
    for full in names:
        name = full.removeprefix(f"{family.prefix}.")
        if re.fullmatch(family.buffers, name):
            continue
        if name in stored:
            raise DataError(
                f"{where} holds both {stored[name]!r} and {full!r}; expected one. Remove either."
            )
        stored[name] = full
    return stored


def _name(path: tuple[Any, ...]) -> str:
    *modules, leaf = (str(entry.key) for entry in path)
    return ".".join([*modules, _LEAVES[leaf]])


def _transposed(family: Family, path: tuple[Any, ...]) -> bool:
    return family.transposed and path[-1].key == "kernel"


def _checked(
    value: np.ndarray, name: str, shape: tuple[int, ...], flip: bool, where: str
) -> np.ndarray:
    expected = shape[::-1] if flip else shape
    if value.shape != expected:
        raise DataError(
            f"{where}: tensor {name} has shape {value.shape}; its configuration says {expected}. "
            "Use the config.json that belongs to it."
        )
    # jnp knows that bfloat16 is a floating point type; numpy alone does not.
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise DataError(
            f"{where}: tensor {name} is of type {value.dtype}; expected floating point. Use a "
            "checkpoint that is not quantised."
        )
    # One sum: NaN and infinities survive it, and it allocates nothing.
    if not np.isfinite(value.sum(dtype=np.float64)):
        raise DataError(f"{where}: tensor {name} holds values that are not finite; get it anew.")
    return value.T if flip else value


def _check_tied(
    family: Family, stored: dict[str, str], read: Callable[[str], np.ndarray], where: str
) -> None:
    embedding = "wte.weight" if family.prefix == "transformer" else "embed_tokens.weight"
    if embedding in stored and not np.array_equal(read(stored[_OUTPUT]), read(stored[embedding])):
        raise DataError(
            f"{where}: {_OUTPUT} differs from {embedding} although the configuration ties them; "
            "set tie_word_embeddings to false if the output layer is its own."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
