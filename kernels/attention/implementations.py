"""Which implementations there are, and which one a call gets.

A new one is an entry of `IMPLEMENTATIONS`: what computes a primitive on the CPU and on any other
device, with the arguments of `reference.run`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import chunked, reference  # pyright: ignore[reportMissingImports]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What computes a primitive: `run(name, pattern, *operands) -> outputs`.

    Attributes:
      cpu: computes it on the CPU.
      device: computes it on any other device.
      partial: whether both take None for operands that are zero, and an argument `wanted` that
        says which outputs to return; where not, they get zeros and return all outputs.
    """

    cpu: Callable[..., list[jax.Array]]
    device: Callable[..., list[jax.Array]]
    partial: bool = False


IMPLEMENTATIONS = {
    "reference": Implementation(reference.run, reference.run, partial=True),
    "chunked": Implementation(
        functools.partial(chunked.run, tiling=chunked.CPU),
        functools.partial(chunked.run, tiling=chunked.DEVICE),
        partial=True,
    ),
}
BEST = "chunked"
# Names that belong to this interface and that this release cannot run.
_ABSENT = {
    "pallas": "this release has no Pallas kernels",
    "thunderkittens": "this release has no ThunderKittens kernels",
}


def choose(implementation: str | None) -> str:
    """The name of the implementation that a call with this argument runs.

    Raises:
      ConfigError: there is no such implementation, or it cannot run here; the message says why.
    """
    if implementation is None:
        return BEST
    if implementation in IMPLEMENTATIONS:
        return implementation
    reason = _ABSENT.get(implementation, "there is none of that name")
    raise ConfigError(
        f"implementation={implementation!r} cannot run: {reason}; expected one of "
        f"{sorted(IMPLEMENTATIONS)}, or None for the best of them."
    )
