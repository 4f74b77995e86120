"""Settings every test relies on, made before jax, numpy or grain are imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One BLAS thread per process: the machine's cores are shared with grain's workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys

import pytest
from absl import flags
from hypothesis import settings

# grain's worker processes copy the absl flags, which pytest never parses.
flags.FLAGS.mark_as_parsed()

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Compiled programs map memory, and a process has a limited number of mappings."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
