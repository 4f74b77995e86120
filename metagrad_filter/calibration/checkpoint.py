"""Where a training job stands, read from the Orbax checkpoints that it writes anyway.

Input: a directory of checkpoints and the proxy's parameters. Output: step, parameters and optimizer
state of the newest complete checkpoint. Read are the layouts that jobs use: `CheckpointManager`
with one or several items, plain `StandardCheckpointer` folders, trees of dicts, `TrainState`,
`nnx.State`. Orbax gives back dicts and lists where optax keeps named tuples, so leaves are matched
by their names. Only the leaves that are wanted are read, and nothing is written.

Cost: one read of parameters and moments; training is not involved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from metagrad_filter.calibration.leaves import (
    Names,
    dotted,
    listed,
    match_moments,
    match_params,
    named,
    names_of,
    outline,
    resolve,
)
from metagrad_filter.errors import CalibrationFailed, ConfigError, MetagradFilterError
from metagrad_filter.types import PyTree

_PARAMS = ("params", "model")
_OPT_STATE = ("opt_state", "optimizer_state")
_OPTIMIZER = (*_OPT_STATE, "optimizer")
_ATTEMPTS = 20
_PAUSE_SECONDS = 0.3


class TrainingState(NamedTuple):
    """A point of a training job."""

    step: int | None  # None where the folder's name holds no number
    params: PyTree
    opt_state: PyTree  # None where the checkpoint holds none


@dataclass(frozen=True)
class Checkpoints:
    """Orbax checkpoints of a training job, named by where they lie.

    Attributes:
      directory: the folder that holds one folder for each step (`7`, `step_00000007`), or one such
        folder; a path or a bucket's address.
      params: where the parameters lie in the checkpoint, as names joined by dots, for instance
        "state.params". None looks for a node called `params` or `model`, outside of the optimizer
        state, whose leaves have the names of the proxy's, or takes the whole tree if that has.
      opt_state: where the optimizer state lies, for instance "state.opt_state.inner_state". None
        looks for a node called `opt_state` or `optimizer_state`; if there is none, the checkpoint
        holds weights only, and the round warms moments itself.

    Raises:
      ConfigError: a field is not a path.
    """

    directory: str
    params: str | None = None
    opt_state: str | None = None

    def __post_init__(self):
        directory = str(self.directory)
        if not directory:
            raise ConfigError("Checkpoints(directory='') names no folder; pass a path.")
        if "://" not in directory:
            directory = str(epath.Path(directory).expanduser().absolute())
        object.__setattr__(self, "directory", directory)
        for name in ("params", "opt_state"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip("./")):
                raise ConfigError(
                    f"Checkpoints({name}={value!r}); expected names joined by dots, such as "
                    "'state.params', or None to look for it."
                )

    def newest(
        self, params: PyTree, optimizer: optax.GradientTransformation
    ) -> TrainingState | None:
        """Reads the newest complete checkpoint.

        A checkpoint that the job removes while it is read is given up for the next newest one.

        Args:
          params: the proxy's parameters: names, shapes, dtypes, and for `jax.Array`s across several
            devices the sharding that is restored to.
          optimizer: the proxy's transformation, whose state names the moments.

        Returns:
          The state, or None where the directory does not exist or holds no complete checkpoint yet.

        Raises:
          ConfigError: `params` or `opt_state` name nothing in the checkpoint, or several nodes fit.
          CalibrationFailed: the checkpoint cannot be read, or is not one of the proxy's model; the
            message names the leaf.
        """
        for attempt in range(_ATTEMPTS):
            path = self._newest_path()
            if path is None:
                return None
            try:
                return self._read(path, params, optimizer)
            except (OSError, ValueError, KeyError, MetagradFilterError) as error:
                # A checkpoint that the job removes fails in any of these ways. Then a newer one
                # lies there already, or its files become fewer; what stays as it is, is wrong.
                before = _files(path)
                time.sleep(_PAUSE_SECONDS)
                stays = self._newest_path() == path and before == _files(path)
                if not stays and attempt < _ATTEMPTS - 1:
                    continue
                if isinstance(error, MetagradFilterError):
                    raise
                raise CalibrationFailed(
                    f"the checkpoint {path} cannot be read: {_short(error)}; remove it if it is "
                    "damaged, or name the folder that the training job writes to."
                ) from error
        raise AssertionError("the last attempt returns or raises")

    def _newest_path(self) -> epath.Path | None:
        directory = epath.Path(self.directory)
        try:
            if any((directory / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA")):
                return directory
            found = ocp.utils.checkpoint_steps_paths(directory)
        except FileNotFoundError:
            return None
        return max(found, key=lambda path: _step(path) or 0, default=None)

    def _read(
        self, path: epath.Path, params: PyTree, optimizer: optax.GradientTransformation
    ) -> TrainingState:
        items = _items(path)
        saved = {
            (*item, *names): leaf for item, tree in items.items() for names, leaf in named(tree)
        }
        where = self._params_at(saved, set(items), params, path)
        like = dict(match_params(saved, where, params, path))
        at = self._opt_state_at(saved, path)
        template = jax.eval_shape(optimizer.init, params)
        moments = None
        if at is not None:
            moments = match_moments(saved, at, where, params, template, path)
            like |= {names: leaf for names, leaf in moments if names}
        values = _restore(path, items, like)
        found = [values[where + names] for names, _ in named(params)]
        opt_state = None
        if moments is not None:
            fresh = jax.tree.leaves(optimizer.init(params))
            leaves = [values[names] if names else new for (names, _), new in zip(moments, fresh)]
            opt_state = jax.tree.unflatten(jax.tree.structure(template), leaves)
        elif not jax.tree.leaves(template):
            opt_state = template
        params = jax.tree.unflatten(jax.tree.structure(params), found)
        return TrainingState(_step(path), params, opt_state)

    def _params_at(
        self, saved: dict[Names, Any], roots: set[Names], params: PyTree, path: epath.Path
    ) -> Names:
        if self.params is not None:
            return resolve(saved, "params", self.params, path)
        expected = {names for names, _ in named(params)}
        nodes: dict[Names, set[Names]] = {}
        for names in saved:
            for i in range(len(names)):
                nodes.setdefault(names[:i], set()).add(names[i:])
        outside = {n: held for n, held in nodes.items() if not set(n) & set(_OPTIMIZER)}
        called = {n: held for n, held in outside.items() if n and n[-1] in _PARAMS}
        # A checkpoint may hold the parameters and nothing else.
        fits = [n for n, held in called.items() if held == expected] or [
            n for n in roots & outside.keys() if outside[n] == expected
        ]
        if len(fits) > 1:
            raise ConfigError(
                f"the parameters may lie at {listed(fits)} in {path}; say which, for instance "
                f"params={dotted(fits[0])!r}."
            )
        if not fits and not called:
            raise ConfigError(
                f"no node called {' or '.join(_PARAMS)} in {path}, which holds "
                f"{listed(outline(saved))}; say where the parameters lie, for instance "
                "params='state.params'."
            )
        # Where nothing fits, the nearest node is compared leaf by leaf, for the message's sake.
        return fits[0] if fits else max(called, key=lambda n: len(called[n] & expected))

    def _opt_state_at(self, saved: dict[Names, Any], path: epath.Path) -> Names | None:
        if self.opt_state is not None:
            return resolve(saved, "opt_state", self.opt_state, path)
        found = {
            names[: i + 1]
            for names in saved
            for i, name in enumerate(names[:-1])
            if name in _OPT_STATE and not set(names[:i]) & set(_OPT_STATE)
        }
        if len(found) > 1:
            raise ConfigError(
                f"the optimizer state may lie at {listed(found)} in {path}; say which, for "
                f"instance opt_state={dotted(min(found))!r}."
            )
        return next(iter(found), None)


def _items(path: epath.Path) -> dict[Names, PyTree]:
    """Trees of metadata in a checkpoint, by the name of the item; one without name is `()`."""
    handler = ocp.PyTreeCheckpointHandler()
    if (path / "_METADATA").exists():
        return {(): handler.metadata(path).tree}
    found = {(p.name,): p for p in path.iterdir() if (p / "_METADATA").exists()}
    if not found:
        raise CalibrationFailed(
            f"{path} holds no tree of arrays, only {sorted(p.name for p in path.iterdir())}; "
            "expected what orbax.checkpoint saves with StandardSave or PyTreeSave."
        )
    return {name: handler.metadata(p).tree for name, p in sorted(found.items())}


def _restore(
    path: epath.Path, items: dict[Names, PyTree], like: dict[Names, Any]
) -> dict[Names, Any]:
    """Reads the leaves named in `like`, with its dtypes and shardings, and no other."""
    values: dict[Names, Any] = {}
    for item, tree in items.items():
        if not any(names[: len(item)] == item for names in like):
            continue
        paths, treedef = jax.tree.flatten_with_path(tree)
        names = [(*item, *names_of(p)) for p, _ in paths]
        asked = [like.get(n) for n in names]
        target = [ocp.PLACEHOLDER if leaf is None else leaf for leaf in asked]
        found = ocp.PyTreeCheckpointHandler().restore(
            path.joinpath(*item),
            args=ocp.args.PyTreeRestore(
                item=treedef.unflatten(target),
                restore_args=treedef.unflatten([_restore_args(leaf) for leaf in asked]),
            ),
        )
        read = jax.tree.leaves(found, is_leaf=lambda x: x is ocp.PLACEHOLDER)
        values |= {
            n: jnp.asarray(value)
            for n, leaf, value in zip(names, asked, read, strict=True)
            if leaf is not None
        }
    return values


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if leaf is None:
        return ocp.RestoreArgs()
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype, global_shape=leaf.shape)


def _step(path: epath.Path) -> int | None:
    try:
        return ocp.utils.step_from_checkpoint_name(path.name)
    except ValueError:
        return None


def _short(error: Exception) -> str:
    return str(error).split(" [tensorstore_spec")[0]


def _files(path: epath.Path) -> int:
    """How many files and folders lie below; fewer of them each time it is being removed."""
    try:
        return sum(1 + (_files(p) if p.is_dir() else 0) for p in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0
