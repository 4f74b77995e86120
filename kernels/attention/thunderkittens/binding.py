"""Operands of the primitives as the custom calls on Hopper take them, and whether those can run.

A call gets q, k, v and what is like them as they are, `(B, S, H, d)` bfloat16, zeros appended to d
up to 64 or 128; statistics of queries padded to whole blocks, the logsumexp in units of log 2 and
+inf in the padding; and, for packed documents, which tiles hold which segment ids.

Cost beyond the kernels: a copy of the statistics, and of the operands where d is not 64 or 128; of
fused calls also outputs of queries in float32, which they set to zero, and the cast of these.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import _jax, chunked  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.thunderkittens import building  # pyright: ignore[reportMissingImports]

# `default`: calls that name no implementation use this one where it runs and fits.
# `elsewhere`: programs are lowered for a machine other than this one, which is not examined.
SWITCH = "METAGRAD_FILTER_THUNDERKITTENS"
CALLS = ("fwd", "lin", "bwd", "hess", "adj")
FUSED = ("bwd", "hess", "adj")  # of these there is a second custom call, in one sweep
BLOCK = 128  # positions that a thread block of a kernel holds
FORWARD_TILE = 128
_NORM = 3  # the position of the logsumexp among the operands


def target(name: str, fused: bool = False) -> str:
    """The custom call of a primitive."""
    return f"attention_hopper_{name}" + ("_fused" if fused and name in FUSED else "")


def targets() -> list[str]:
    """Every custom call of the plugin."""
    return [target(name) for name in CALLS] + [target(name, fused=True) for name in FUSED]


def tile(name: str, width: int) -> int:
    """Positions of a tile that streams past a block, by primitive and padded head dimension."""
    return FORWARD_TILE if name == "fwd" else 64 if width == 64 else 32


def misfit(q: Any, fused: bool = False) -> str | None:
    """Why operands of this dtype and head dimension cannot be computed here, or None.

    Args:
      q: the queries.
      fused: as of `run`.
    """
    most = widest(fused)
    if q.dtype != jnp.bfloat16:
        return f"the operands are {q.dtype}, and this computes bfloat16"
    if q.shape[-1] > most:
        return f"the head dimension is {q.shape[-1]}, and this computes up to {most}"
    return None


def widest(fused: bool) -> int:
    """The largest head dimension; registers do not hold a fused sweep's sums beyond 64."""
    return 64 if fused else 128


def chosen_by_default() -> bool:
    """Whether the environment asks for this implementation where calls name none."""
    return os.environ.get(SWITCH) == "default"


def reason() -> str | None:
    """Why the custom calls cannot run in this process, or None; builds and loads them if need be.

    Takes half a minute where they have not been built on this machine before.
    """
    if os.environ.get(SWITCH) == "elsewhere":
        return None
    kinds = {_kind(device) for device in jax.devices()}
    if not all(kind.startswith("gpu 9.0") for kind in kinds):
        return (
            f"no ThunderKittens kernels run on {', '.join(sorted(kinds))}, they need a GPU of "
            f"compute capability 9.0, or {SWITCH}=elsewhere to lower programs for one"
        )
    return _loaded()


def reason_fused() -> str | None:
    """As `reason`, for the fused sweeps, which XLA must not have been told to do without."""
    for flag in ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"):
        found = re.findall(rf"--{flag}(?:=(\S*))?(?:\s|$)", os.environ.get("XLA_FLAGS", ""))
        if found and found[-1].lower() in ("", "true", "1"):
            return (
                f"XLA_FLAGS holds --{flag}, and the sums of its kernels come in a different order "
                "each time; name 'thunderkittens', which is deterministic, or take the flag out"
            )
    return reason()


def _kind(device: Any) -> str:
    capability = getattr(device, "compute_capability", None)
    return f"{device.platform} {capability}" if capability else device.platform


@functools.cache
def _loaded() -> str | None:
    path, problem = building.plugin()
    if path is None:
        return problem
    # The plugin takes two functions from the driver, which jax loads for itself alone.
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    register(load(path), "CUDA")
    return None


def load(path: Any) -> ctypes.CDLL:
    """The library at this path; what it takes from the driver is looked up when it is called."""
    return ctypes.CDLL(str(path), mode=os.RTLD_LAZY)


def register(library: ctypes.CDLL, platform: str) -> None:
    """Tells jax about the custom calls of a library."""
    for name in targets():
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def run(name: str, pattern: Pattern, *operands: jax.Array, fused: bool = False) -> list[jax.Array]:
    """Computes primitive `name` in bfloat16 with float32 sums.

    Args:
      name: of `formulas.OPERANDS`; lin2, which forward over forward needs, is left to `chunked`.
      pattern: which scores there are.
      *operands: all of the primitive's, and segment ids where there are any.
      fused: whether bwd, hess and adj are one sweep, which computes scores once and adds up what
        is per query in no fixed order; where not, two sweeps, each deterministic.

    Raises:
      ConfigError: the operands are not bfloat16, or their head dimension is beyond 128 (fused: 64).
    """
    problem = misfit(operands[0], fused)
    if problem is not None:
        raise ConfigError(
            f"implementation={'thunderkittens_fused' if fused else 'thunderkittens'!r} cannot run: "
            f"{problem}; expected bfloat16 and a head dimension of at most {widest(fused)}: cast "
            "the operands, or name another implementation."
        )
    if name not in CALLS:
        return chunked.run(name, pattern, *operands, tiling=chunked.DEVICE)
    kinds, outputs = OPERANDS[name]
    q, k = operands[:2]
    batch, length, heads, width = q.shape
    wide = 64 if width <= 64 else 128
    padded = -(-length // BLOCK) * BLOCK
    laid = [
        _statistic(x, padded, position == _NORM) if kind == "r" else _widened(x, wide)
        for position, (kind, x) in enumerate(zip(kinds, operands))
    ]
    segments = operands[len(kinds) :]
    tables = _tables(segments[0], padded, tile(name, wide)) if segments else _no_tables()
    shapes = {
        "q": jax.ShapeDtypeStruct((batch, length, heads, wide), q.dtype),
        "k": jax.ShapeDtypeStruct((*k.shape[:3], wide), q.dtype),
        "r": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    }
    adds = fused and name in FUSED
    if adds:
        shapes["q"] = jax.ShapeDtypeStruct(shapes["q"].shape, jnp.float32)
    call = jax.ffi.ffi_call(target(name, fused), tuple(shapes[kind] for kind in outputs))
    found = call(
        *_jax.align([*laid, *tables]),
        scale=np.float32(pattern.scale),
        left=_side(pattern.left),
        right=_side(pattern.right),
        segmented=np.int64(bool(segments)),
    )
    if adds:  # the first is the one of q, to which the scale of scores is still missing
        found = [x * pattern.scale if n == 0 else x for n, x in enumerate(found)]
        found = [x if kind == "r" else x.astype(q.dtype) for kind, x in zip(outputs, found)]
    return [x if kind == "r" else x[..., :width] for kind, x in zip(outputs, found)]


def _side(limit: int | None) -> np.int64:
    return np.int64(-1 if limit is None else limit)


def _widened(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))


def _statistic(x: jax.Array, padded: int, norm: bool) -> jax.Array:
    x = x.astype(jnp.float32) * (math.log2(math.e) if norm else 1.0)
    fill = jnp.inf if norm else 0.0
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2])), constant_values=fill)


def _tables(ids: jax.Array, padded: int, size: int) -> tuple[jax.Array, ...]:
    """Segment ids, ids at the ends of each tile, and the tiles that share one with each block."""
    ids = jnp.pad(ids, ((0, 0), (0, padded - ids.shape[1])), mode="edge")
    tiles, blocks = (_spans(ids, n) for n in (size, BLOCK))
    shared = blocks[:, :, None, 0] <= tiles[:, None, :, 1]
    shared &= tiles[:, None, :, 0] <= blocks[:, :, None, 1]
    first, last = shared.argmax(-1), tiles.shape[1] - shared[..., ::-1].argmax(-1)
    return ids, tiles, jnp.stack([first, last], axis=-1).astype(jnp.int32)


def _spans(ids: jax.Array, size: int) -> jax.Array:
    """`(B, P / size, 2)` least and greatest id of `size` consecutive positions."""
    parts = ids.reshape(ids.shape[0], -1, size)
    return jnp.stack([parts.min(-1), parts.max(-1)], axis=-1)


def _no_tables() -> tuple[jax.Array, ...]:
    none = jnp.zeros((1, 1, 2), jnp.int32)
    return none[:, :, 0], none, none
