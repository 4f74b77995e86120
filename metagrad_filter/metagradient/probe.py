"""The probe: a parameter-shaped query that scores any window with one forward-mode product.

A window that was not in the trajectory has weight zero there. Its metagradient at insertion step t
is `<grad loss(window), c_t> / B`, a directional derivative of its loss along the cotangent of that
step's gradient. All trajectories of a round start from the same parameters, so their cotangents,
averaged over insertion steps, may be averaged over trajectories *before* any window is scored.

Cost: one JVP a window, about 0.95 of a gradient evaluation, without backward pass or tape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metagrad_filter.errors import ConfigError, NonFiniteMetagradient, WindowError
from metagrad_filter.metagradient.trajectory import window_losses
from metagrad_filter.types import Loss, PyTree

_DEFAULT_BATCH = 128
_CHUNKS_PER_CALL = 16


def probe_scores(
    loss: Loss, params: PyTree, probe: PyTree, windows: PyTree, *, batch_size: int | None = None
) -> np.ndarray:
    """Scores windows against a probe: score = -<grad loss(window), probe>.

    Where `params` or `windows` lie on a device mesh (see `metagrad_filter.sharding`), every
    evaluation is cut along its windows over all of its devices.

    Args:
      loss: `loss(params, batch) -> (B,)`, the same function as for `metagradients`.
      params: where the trajectory started.
      probe: `Metagradients.probe`, or an average of several.
      windows: pytree of arrays with a leading axis `N`; in several processes the same in each, or
        arrays that are sharded over all of them.
      batch_size: windows per evaluation, default 128; on a mesh rounded up to a multiple of its
        devices.

    Returns:
      `(N,)` float32, higher is better; whole in every process.

    Raises:
      WindowError: the arrays of `windows` disagree in their leading axis.
      ConfigError: `probe` is not shaped like `params`, `loss` does not return one loss per window,
        or `batch_size` is not positive.
      NonFiniteMetagradient: a score is not finite; names the window.
    """
    return score_with_probes(loss, params, [probe], windows, batch_size=batch_size)[0]


def score_with_probes(
    loss: Loss,
    params: PyTree,
    probes: Sequence[PyTree],
    windows: PyTree,
    *,
    batch_size: int | None = None,
    progress=lambda done: None,
) -> np.ndarray:
    """`probe_scores` for several probes that share each window's forward evaluation.

    Args:
      probes: K pytrees like `params`.
      progress: called with the number of windows done so far.

    Returns:
      `(K, N)` float32.
    """
    sizes = {int(np.shape(x)[0]) if np.ndim(x) else -1 for x in jax.tree.leaves(windows)}
    if len(sizes) != 1 or -1 in sizes:
        raise WindowError(
            f"windows have the leading sizes {sorted(sizes)}; expected the same N in every array."
        )
    for probe in probes:
        if jax.tree.map(jnp.shape, probe) != jax.tree.map(jnp.shape, params):
            raise ConfigError(
                "the probe is not shaped like params; pass one probe of metagradients(...) (with "
                "several outer metrics, one entry of the dict)."
            )
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}; expected a positive integer or None.")
    (count,) = sizes
    mesh = mesh_of(params) or mesh_of(windows)
    devices = mesh.size if mesh else 1
    size = -(-min(batch_size or _DEFAULT_BATCH, max(count, 1)) // devices) * devices
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *probes)
    scores = np.empty((len(probes), count), np.float32)
    stride = size * _CHUNKS_PER_CALL
    for start in range(0, count, stride):
        stop = min(start + stride, count)
        chunks = -(-(stop - start) // size)
        # Clipped indices repeat the last window so that every call but the last has one shape.
        index = np.minimum(np.arange(start, start + chunks * size), count - 1)
        pieces = jax.tree.map(
            lambda x, i=index, n=chunks: _rows(x, i).reshape(n, size, *np.shape(x)[1:]),
            windows,
        )
        found = np.asarray(_score_pieces(params, stacked, pieces, loss=loss, mesh=mesh))
        scores[:, start:stop] = found[:, : stop - start]
        progress(stop)
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise NonFiniteMetagradient(
            f"{len(bad)} of {scores.size} probe scores are not finite, the first for window "
            f"{int(bad[0][1])}; check that window and the probe.",
            windows=tuple(sorted({int(window) for _, window in bad})),
        )
    return scores


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh of several devices that a tree's arrays lie on, or None."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None


def _rows(x: Any, index: np.ndarray) -> Any:
    # What lies in other processes too cannot be brought here, and is indexed where it lies.
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x[index]
    return np.asarray(x)[index]


@functools.partial(jax.jit, static_argnames=("loss", "mesh"))
def _score_pieces(params, probes, pieces, *, loss, mesh):
    if mesh is not None:
        over_windows = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
        pieces = jax.lax.with_sharding_constraint(pieces, over_windows)

    def score(batch):
        count = jax.tree.leaves(batch)[0].shape[0]
        losses = functools.partial(window_losses, loss, batch=batch, count=count)
        along = functools.partial(jax.jvp, losses, (params,))
        return -jax.vmap(lambda probe: along((probe,))[1])(probes)

    scores = jax.lax.map(score, pieces)
    scores = jnp.moveaxis(scores, 1, 0).reshape(scores.shape[1], -1)
    if mesh is None:
        return scores
    # Every process reads all scores, wherever the windows lie.
    return jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))
