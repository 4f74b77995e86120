"""The doctor: is the installation whole, and are metagradients right for this model?

`installation.py` looks at packages, devices and native code, `examination.py` runs every check of
`metagrad_filter.metagradient.checks` on a model in training; `small_world.py` holds the built-in
one, and `calibration/setup.py` finds the user's own.
"""

from metagrad_filter.calibration.setup import load_setup
from metagrad_filter.doctor.examination import Row, examine, examine_small_world
from metagrad_filter.doctor.installation import inspect_installation

__all__ = ["Row", "examine", "examine_small_world", "inspect_installation", "load_setup"]
