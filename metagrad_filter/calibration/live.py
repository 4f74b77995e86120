"""Live training state: how a training job hands the calibrator the point it has reached.

Orbax writes each state into a folder of its own and renames it when complete, so a reader in
another process sees a whole state or none. States lie under `run_dir/live/<session>`, one session
for each `Calibrator`: a job that starts anew in the same run directory is never measured at the
parameters of the job before it. Jobs that write Orbax checkpoints anyway need none of this, see
`checkpoint.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import optax
import orbax.checkpoint as ocp

from metagrad_filter.calibration.checkpoint import Checkpoints, TrainingState
from metagrad_filter.types import PyTree


def save_live(
    run_dir: str | Path, session: str, step: int, params: PyTree, opt_state: PyTree
) -> None:
    """Stores parameters and optimizer state of a training step under `run_dir/live`.

    The two newest states are kept, those of earlier sessions are removed. Where training was set
    back, states of this step and later ones belong to a course that was given up, and are removed.
    Returns when the state is complete.

    Args:
      opt_state: None where only the weights are handed over.
    """
    folder = Path(run_dir) / "live"
    for other in folder.iterdir() if folder.is_dir() else ():
        if other.name != session:
            shutil.rmtree(other, ignore_errors=True)
    state = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((folder / session).absolute(), options=options) as manager:
        for abandoned in [known for known in manager.all_steps() if known >= step]:
            manager.delete(abandoned)
        manager.save(step, args=ocp.args.StandardSave(state), force=True)
        manager.wait_until_finished()


def latest_live(
    run_dir: str | Path, session: str, params: PyTree, optimizer: optax.GradientTransformation
) -> TrainingState | None:
    """The newest live state of a session, or None.

    Args:
      run_dir, session: as for `save_live`.
      params, optimizer: as for `Checkpoints.newest`.

    Raises:
      CalibrationFailed: there is a state, but it is not one of this model and optimizer.
    """
    folder = Path(run_dir) / "live" / session
    return Checkpoints(str(folder), params="params").newest(params, optimizer)
