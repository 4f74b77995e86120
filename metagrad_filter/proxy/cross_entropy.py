"""Cross-entropy of next tokens without materialising the logits of the whole batch.

Logits are the largest array of a language model: positions x vocabulary. They are computed for a
chunk of positions at a time and recomputed in every derivative, forward or reverse, so memory is
bounded by one chunk whatever the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_CHUNK_BYTES = 64 << 20  # below this all logits fit beside the caches and nothing is recomputed


def token_cross_entropy(
    hidden: jax.Array, embedding: jax.Array, targets: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """Negative log-likelihood of each target token.

    Args:
      hidden: `(N, D)` final hidden states.
      embedding: `(V, D)` output embedding; logits are `hidden @ embedding.T`.
      targets: `(N,)` int32 token ids.
      chunk: positions per piece; default: as many as fit 64 MiB of logits.

    Returns:
      `(N,)` nats per token, in float32 or wider.
    """
    count, vocab = hidden.shape[0], embedding.shape[0]
    width = jnp.promote_types(hidden.dtype, jnp.float32)
    if chunk is None:
        chunk = max(1, _CHUNK_BYTES // (vocab * width.itemsize))
    if chunk >= count:
        return _piece(hidden, embedding, targets)
    padding = -count % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)
    piece = jax.checkpoint(_piece)
    losses = jax.lax.map(lambda x: piece(x[0], embedding, x[1]), (hidden, targets))
    return losses.reshape(-1)[:count]


def _piece(hidden: jax.Array, embedding: jax.Array, targets: jax.Array) -> jax.Array:
    logits = (hidden @ embedding.T).astype(jnp.promote_types(hidden.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen
