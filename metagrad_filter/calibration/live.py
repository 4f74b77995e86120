"""Live training state: how a training job hands the calibrator the point it has reached.

Orbax writes each state into a folder of its own and renames it when complete, so a reader in
another process sees a whole state or none. States lie under `run_dir/live/<session>`, one session
for each `Calibrator`: a job that starts anew in the same run directory is never measured at the
parameters of the job before it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from metagrad_filter.errors import CalibrationFailed
from metagrad_filter.types import PyTree


def save_live(
    run_dir: str | Path, session: str, step: int, params: PyTree, opt_state: PyTree
) -> None:
    """Stores parameters and optimizer state of a training step under `run_dir/live`.

    The two newest states are kept, those of earlier sessions are removed. Where training was set
    back, states of this step and later ones belong to a course that was given up, and are removed.
    Returns when the state is complete.
    """
    folder = Path(run_dir) / "live"
    for other in folder.iterdir() if folder.is_dir() else ():
        if other.name != session:
            shutil.rmtree(other, ignore_errors=True)
    with _manager(folder / session) as manager:
        for abandoned in [known for known in manager.all_steps() if known >= step]:
            manager.delete(abandoned)
        manager.save(
            step,
            args=ocp.args.StandardSave({"params": params, "opt_state": opt_state}),
            force=True,
        )
        manager.wait_until_finished()


def latest_live(
    run_dir: str | Path, session: str, params: PyTree, opt_state: PyTree
) -> tuple[int, PyTree, PyTree] | None:
    """The newest live state of a session as `(step, params, opt_state)`, or None.

    Args:
      run_dir, session: as for `save_live`.
      params, opt_state: examples of the structure, shapes and dtypes.

    Raises:
      CalibrationFailed: there is a state, but it cannot be read as one like the examples.
    """
    folder = Path(run_dir) / "live" / session
    if not folder.is_dir():
        return None
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype)),
        {"params": params, "opt_state": opt_state},
    )
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        try:
            state = manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise CalibrationFailed(
                f"the training state of step {step} in {folder} cannot be restored: {error}; hand "
                "over parameters and optimizer state of the same model as the proxy's."
            ) from error
    return step, state["params"], state["opt_state"]


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
