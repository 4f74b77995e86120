"""Second-order attention: softmax attention whose derivatives have derivatives, in linear memory.

    from metagrad_filter.kernels.attention import attention
    o = attention(q, k, v)                  # (B, S, H, d) each, causal

Metagradients through a transformer differentiate the backward pass of attention. Here the forward
pass, its backward pass and their derivatives are six primitives that jax composes to any
derivative; each has a closed form that is computed tile by tile.

Read next: `formulas.py` (the mathematics), `primitives.py` (the rules), `chunked.py` (the loops),
`implementations.py` (what else can compute them).
"""

from __future__ import annotations

from metagrad_filter.kernels.attention.api import attention  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import IMPLEMENTATIONS  # pyright: ignore[reportMissingImports]

__all__ = ["IMPLEMENTATIONS", "attention"]
