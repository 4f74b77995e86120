"""Live training state: how a training job hands the calibrator the point it has reached.

Orbax writes each state into a folder of its own and renames it when complete, so a reader in
another process sees a whole state or none.
"""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from metagrad_filter.types import PyTree


def save_live(run_dir: str | Path, step: int, params: PyTree, opt_state: PyTree) -> None:
    """Stores parameters and optimizer state of a training step under `run_dir/live`.

    The two newest states are kept. Where training was set back, states of this step and later ones
    belong to a course that was given up, and are removed. Returns when the state is complete.
    """
    with _manager(run_dir) as manager:
        for abandoned in [known for known in manager.all_steps() if known >= step]:
            manager.delete(abandoned)
        manager.save(
            step,
            args=ocp.args.StandardSave({"params": params, "opt_state": opt_state}),
            force=True,
        )
        manager.wait_until_finished()


def latest_live(
    run_dir: str | Path, params: PyTree, opt_state: PyTree
) -> tuple[int, PyTree, PyTree] | None:
    """The newest live state as `(step, params, opt_state)`, or None.

    Args:
      params, opt_state: examples of the structure, shapes and dtypes.
    """
    if not (Path(run_dir) / "live").is_dir():
        return None
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.asarray(x).dtype),
        {"params": params, "opt_state": opt_state},
    )
    with _manager(run_dir) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        state = manager.restore(step, args=ocp.args.StandardRestore(like))
    return step, state["params"], state["opt_state"]


def _manager(run_dir: str | Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (Path(run_dir) / "live").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
