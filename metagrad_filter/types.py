"""Types that several rooms share; importing this imports no jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import jax

PyTree: TypeAlias = Any
Loss: TypeAlias = Callable[[PyTree, PyTree], "jax.Array"]
"""`loss(params, batch) -> (B,)`: the loss of each window of a batch."""
Outer: TypeAlias = Callable[[PyTree], "jax.Array"]
"""`outer(params) -> scalar`: an outer metric Phi, lower is better."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is."""


def silent(stage: str, done: int, total: int) -> None:
    """The `Progress` that shows nothing."""
    del stage, done, total
