"""Which implementations there are, and which one a call gets.

A new one is an entry of `IMPLEMENTATIONS`: what computes a primitive on the CPU and on any other
device, with the arguments of `reference.run`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import (  # pyright: ignore[reportMissingImports]
    chunked,
    reference,
    thunderkittens,
)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What computes a primitive: `run(name, pattern, *operands) -> outputs`.

    Attributes:
      cpu: computes it on the CPU.
      device: computes it on any other device.
      partial: whether both take None for operands that are zero, and an argument `wanted` that
        says which outputs to return; where not, they get zeros and return all outputs.
      refuses: why calls cannot name it in this process, or None.
    """

    cpu: Callable[..., list[jax.Array]]
    device: Callable[..., list[jax.Array]]
    partial: bool = False
    refuses: Callable[[], str | None] = lambda: None


def _not_on_cpu(name: str, needs: str) -> Callable[..., list[jax.Array]]:
    """What computes a primitive on the CPU, where the named implementation cannot."""

    def refuse(*arguments, **options):
        del arguments, options
        raise ConfigError(
            f"implementation={name!r} cannot run: the computation is for a CPU, and this needs "
            f"{needs}; expected 'chunked', 'reference', or None for the best of them."
        )

    return refuse


# Pallas for Triton is loaded by who names it: it takes time to load, and jax means to drop it.


def _pallas(*arguments, **options) -> list[jax.Array]:
    from metagrad_filter.kernels.attention import pallas  # pyright: ignore[reportMissingImports]

    return pallas.run(*arguments, **options)


def _no_pallas() -> str | None:
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError as error:
        return f"jax {jax.__version__} has no Pallas for Triton ({error})"
    return None


IMPLEMENTATIONS = {
    "reference": Implementation(reference.run, reference.run, partial=True),
    "chunked": Implementation(
        functools.partial(chunked.run, tiling=chunked.CPU),
        functools.partial(chunked.run, tiling=chunked.DEVICE),
        partial=True,
    ),
    "pallas": Implementation(
        _not_on_cpu("pallas", "a GPU that Triton compiles for"),
        _pallas,
        partial=True,
        refuses=_no_pallas,
    ),
    "thunderkittens": Implementation(
        _not_on_cpu("thunderkittens", "a Hopper GPU"),
        thunderkittens.run,
        refuses=thunderkittens.reason,
    ),
    "thunderkittens_fused": Implementation(
        _not_on_cpu("thunderkittens_fused", "a Hopper GPU"),
        functools.partial(thunderkittens.run, fused=True),
        refuses=thunderkittens.reason_fused,
    ),
}
# What None means on every device: the GPU kernels have been interpreted and compiled, not timed.
BEST = "chunked"


def choose(implementation: str | None, q: jax.Array | None = None) -> str:
    """The name of the implementation that a call with this argument runs.

    Args:
      implementation: what the call asks for.
      q: the queries. Where they are given, a call that names nothing gets the kernels for Hopper if
        the environment asks for these and they can compute such operands here.

    Raises:
      ConfigError: there is no such implementation, or it cannot run here; the message says why.
    """
    if implementation is None:
        asked = q is not None and thunderkittens.chosen_by_default()
        fits = asked and thunderkittens.misfit(q) is None and thunderkittens.reason() is None
        return "thunderkittens" if fits else BEST
    if implementation in IMPLEMENTATIONS:
        reason = IMPLEMENTATIONS[implementation].refuses()
        if reason is None:
            return implementation
    else:
        reason = "there is none of that name"
    raise ConfigError(
        f"implementation={implementation!r} cannot run: {reason}; expected one of "
        f"{sorted(IMPLEMENTATIONS)}, or None for the best of them."
    )
