"""What a label is: the estimator of record, and the others it is compared with, behind one switch.

    estimate(task).halves      # (K, 2, N): K parts of the target, two halves, N windows

One module an idea, each a function `(Task) -> Estimate`; `CalibrationConfig.estimator` names it.
Everything after it (labels, fit, gate, publishing, report) is one path for all.

| estimator | score of a window | steps |
|---|---|---|
| `metagradient` | -dPhi/dw on the raw stream | `config.inner_steps` |
| `on_policy` | -dPhi/dw on the kept stream | the same |
| `datarater` | -dPhi/dw | 2 |
| `same_batch` | -dPhi/dw in a repeated batch, cold | 16 |
| `one_step` | product of gradients | 1, plain |
| `less` | cosine of the Adam update with the gradient of Phi | 1 |
| `mates` | fall of Phi after a step on the window | 1 |
| `rho_loss` | loss minus that of a model tuned on the target | - |
| `loss` | -loss | - |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from metagrad_filter.calibration.estimators.datarater import datarater
from metagrad_filter.calibration.estimators.less import less
from metagrad_filter.calibration.estimators.loss import loss
from metagrad_filter.calibration.estimators.mates import mates
from metagrad_filter.calibration.estimators.metagradient import metagradient
from metagrad_filter.calibration.estimators.on_policy import on_policy
from metagrad_filter.calibration.estimators.one_step import one_step
from metagrad_filter.calibration.estimators.rho_loss import rho_loss
from metagrad_filter.calibration.estimators.same_batch import same_batch
from metagrad_filter.calibration.estimators.task import Estimate, Task, naming
from metagrad_filter.calibration.estimators.windows import gradient_norms

ESTIMATORS: dict[str, Callable[[Task], Estimate]] = {
    "metagradient": metagradient,
    "one_step": one_step,
    "less": less,
    "datarater": datarater,
    "mates": mates,
    "same_batch": same_batch,
    "on_policy": on_policy,
    "rho_loss": rho_loss,
    "loss": loss,
}

__all__ = ["ESTIMATORS", "Estimate", "Task", "estimate"]


def estimate(task: Task) -> Estimate:
    """Scores the windows of a task with the estimator that its configuration names.

    Raises:
      NonFiniteMetagradient, TrajectoryDiverged: the measurement left the finite numbers or ran
        away; names windows of the source where it can.
    """
    if task.config.normalise_gradient:
        with task.clock("labels"), naming(task.positions, "gradient norms"):
            norms = gradient_norms(
                task.proxy.loss,
                task.proxy.params,
                task.windows,
                microbatch=task.config.microbatch,
            )
        # A window without gradient has score 0, whatever it is divided by.
        task = replace(task, norms=norms + 1e-12)
    found = ESTIMATORS[task.config.estimator](task)
    if task.norms is None:
        return found
    return replace(found, gradients=found.gradients + len(task.windows), norms=task.norms)
