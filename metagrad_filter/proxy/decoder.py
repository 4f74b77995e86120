"""A decoder language model of the GPT-2 family in flax.nnx.

Pre-norm blocks, learned positions, LayerNorm with biases. Fields and module names follow
`transformers` (`GPT2Config`, `h.0.attn.c_attn`). Dropout does not exist here: a metagradient is the
derivative of one deterministic trajectory. Read next: `metagrad_filter.proxy.loss`.

Reference: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", section 2.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy import layers
from metagrad_filter.proxy.activations import ACTIVATIONS


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a GPT-2 decoder, and how it is computed.

    Attributes:
      vocab_size: token ids are in [0, vocab_size).
      n_positions: longest window, in input tokens.
      n_embd: width of the residual stream.
      n_layer: number of blocks.
      n_head: attention heads; divides n_embd.
      activation_function: a name of `activations.ACTIVATIONS`: "gelu_new" (GPT-2), or for instance
        "relu2" (squared ReLU, cheaper on CPU).
      layer_norm_epsilon: inside the root of every LayerNorm.
      initializer_range: standard deviation of the initial embeddings and kernels.
      n_inner: width of the feed-forward layer; None means 4 n_embd.
      tie_word_embeddings: the output layer is the input embedding.
      remat: the backward pass computes each block again instead of keeping its activations.
      dtype: of activations and matrix products, "float32" or "bfloat16"; parameters keep their
        own, norms, softmax and losses are in float32. float64 parameters compute in float64.
      attn_implementation: what computes attention, see `layers.causal_attention`.
    """

    vocab_size: int
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    n_inner: int | None = None
    tie_word_embeddings: bool = True
    remat: bool = False
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self):
        layers.check_sizes(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if self.n_inner is not None:
            layers.check_sizes(self, "n_inner")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; change either."
            )
        layers.check_choice(self, "activation_function", ACTIVATIONS)
        layers.check_positive(self, "layer_norm_epsilon", "initializer_range")
        layers.check_flags(self, "tie_word_embeddings", "remat")
        layers.check_choice(self, "dtype", layers.COMPUTE_DTYPES)
        layers.check_attention(self)

    @property
    def max_tokens(self) -> int:
        """Longest window, in input tokens."""
        return self.n_positions

    @property
    def layer_count(self) -> int:
        """Number of blocks."""
        return self.n_layer


class Attention(nnx.Module):
    """Causal attention with one projection for queries, keys and values."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width, linear = config.n_embd, functools.partial(_linear, config, rngs=rngs)
        self.c_attn = linear(width, 3 * width)
        self.c_proj = linear(width, width, residual=True)
        self.heads, self.implementation = config.n_head, config.attn_implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.c_attn(x).reshape(batch, length, 3, self.heads, -1)
        operands = (qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        mixed = layers.causal_attention(*operands, self.implementation)
        return self.c_proj(mixed.reshape(batch, length, width))


class FeedForward(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        inner, linear = config.n_inner or 4 * config.n_embd, functools.partial(_linear, config)
        self.c_fc = linear(config.n_embd, inner, rngs=rngs)
        self.c_proj = linear(inner, config.n_embd, residual=True, rngs=rngs)
        self.activation = config.activation_function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nnx.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.ln_1 = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _norm(config, rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Decoder(nnx.Module):
    """Token ids `(B, S)` -> hidden states after the last norm, `(B, S, n_embd)`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        embed = functools.partial(
            nnx.Embed, features=config.n_embd, embedding_init=normal, rngs=rngs
        )
        self.wte = embed(config.vocab_size)
        self.wpe = embed(config.n_positions)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = _norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = embed(config.vocab_size)
        self.remat, self.dtype = config.remat, config.dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])
        tables = self.wte.embedding[...], self.wpe.embedding[...]
        x = layers.enter(tables[0][tokens] + tables[1][positions], self.dtype)
        return self.ln_f(layers.walk(self.h, x, remat=self.remat))


def _linear(
    config: DecoderConfig, inputs: int, outputs: int, *, residual: bool = False, rngs: nnx.Rngs
) -> nnx.Linear:
    scale = config.initializer_range
    if residual:
        # GPT-2 scales what is added to the residual stream by the number of such additions.
        scale /= (2 * config.n_layer) ** 0.5
    init = nnx.initializers.normal(scale)
    dtype = layers.layer_dtype(config.dtype)
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)


def _norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, rngs=rngs)
