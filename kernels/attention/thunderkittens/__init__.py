"""`implementation="thunderkittens"` and `"thunderkittens_fused"`: attention on Hopper GPUs.

Answers "how does second-order attention use Hopper's tensor cores and copy engine?". `sweep.cuh` is
the kernel of the derivatives lin, bwd, hess and adj, `forward.cuh` that of attention itself,
`plugin.cu` makes XLA custom calls of them, `building.py` compiles and caches these, `binding.py`
lays out operands for them.

"thunderkittens" computes scores twice in bwd, hess and adj, once for what is per query and once for
what is per key: the same inputs give the same bits. "thunderkittens_fused" (head dimensions up to
64) computes them once, 12 products of S x S x d instead of 17 in adj, and adds up what is per query
in float32 and in no fixed order (`exchange.cuh`). It is refused where XLA is told to be
deterministic.

Needs ThunderKittens' headers and CUDA's compiler where it is built, and a GPU of compute capability
9.0 where it runs; all of it is imported without either.

The kernels pass the compiler's checks and, run by an emulator on the CPU, their tests. No GPU has
run them yet, so they are used where they are named, or where `METAGRAD_FILTER_THUNDERKITTENS` is
`default` (see `binding.SWITCH`), and never by themselves.
"""

from __future__ import annotations

from metagrad_filter.kernels.attention.thunderkittens.binding import (  # pyright: ignore[reportMissingImports]
    chosen_by_default,
    misfit,
    reason,
    reason_fused,
    run,
)

__all__ = ["chosen_by_default", "misfit", "reason", "reason_fused", "run"]
