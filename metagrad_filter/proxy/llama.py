"""A decoder language model of the Llama family in flax.nnx.

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention and a gated feed-forward
layer: Llama 2 and 3, TinyLlama, SmolLM and SmolLM2. Fields and module names follow `transformers`
(`LlamaConfig`, `layers.0.self_attn.q_proj`). Read next: `metagrad_filter.proxy.loss`.

References:
  Touvron et al., 2023, "LLaMA", https://arxiv.org/abs/2302.13971, section 2.2.
  Su et al., 2021, "RoFormer", https://arxiv.org/abs/2104.09864, equations 15 and 34.
  Ainslie et al., 2023, "GQA", https://arxiv.org/abs/2305.13245, section 2.2.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy import layers
from metagrad_filter.proxy.activations import ACTIVATIONS


@dataclass(frozen=True)
class RopeScaling:
    """The `llama3` scaling of rotary frequencies: slow ones are divided by `factor`.

    Attributes:
      factor: divisor of frequencies whose wavelength exceeds
        `original_max_position_embeddings / low_freq_factor` tokens.
      low_freq_factor: below it (in turns per original context) a frequency is fully scaled.
      high_freq_factor: above it a frequency is left as it is; between the two, a blend.
      original_max_position_embeddings: context of the first pretraining, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        layers.check_positive(self, "factor", "low_freq_factor", "high_freq_factor")
        layers.check_sizes(self, "original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor={self.high_freq_factor} is not above low_freq_factor="
                f"{self.low_freq_factor}; exchange them."
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama decoder, and how it is computed.

    Attributes:
      vocab_size: token ids are in [0, vocab_size).
      hidden_size: width of the residual stream.
      intermediate_size: width of the feed-forward layer.
      num_hidden_layers: number of blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads, a divisor of the query heads; None means as many.
      head_dim: width of a head, even; None means hidden_size / num_attention_heads.
      max_position_embeddings: longest window, in input tokens.
      hidden_act: a name of `activations.ACTIVATIONS`; "silu" makes the layer a SwiGLU.
      rms_norm_eps: inside the root of every RMSNorm.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: None for plain rotary positions.
      attention_bias: the four projections of attention have biases.
      mlp_bias: the three projections of the feed-forward layer have biases.
      tie_word_embeddings: the output layer is the input embedding.
      initializer_range: standard deviation of the initial embeddings and kernels.
      remat: the backward pass computes each block again instead of keeping its activations.
      dtype: of activations and matrix products, "float32" or "bfloat16"; parameters keep their
        own, norms, softmax and losses are in float32. float64 parameters compute in float64.
      attn_implementation: what computes attention, see `layers.causal_attention`.
    """

    vocab_size: int
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    remat: bool = False
    dtype: str = "float32"
    attn_implementation: str | None = None

    def __post_init__(self):
        layers.check_sizes(self, "vocab_size", "hidden_size", "intermediate_size")
        layers.check_sizes(self, "num_hidden_layers", "num_attention_heads")
        layers.check_sizes(self, "max_position_embeddings")
        # None is resolved at once, so that configurations of equal models are equal.
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        layers.check_sizes(self, "num_key_value_heads")
        if self.num_attention_heads % self.key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; change either."
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; change either, or give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        layers.check_sizes(self, "head_dim")
        if self.head_width % 2:
            raise ConfigError(
                f"heads are {self.head_width} wide; expected an even width, because rotary "
                "positions turn pairs."
            )
        layers.check_choice(self, "hidden_act", ACTIVATIONS)
        layers.check_positive(self, "rms_norm_eps", "rope_theta", "initializer_range")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ConfigError(
                f"rope_scaling={self.rope_scaling!r}; expected a RopeScaling or None."
            )
        layers.check_flags(self, "attention_bias", "mlp_bias", "tie_word_embeddings", "remat")
        layers.check_choice(self, "dtype", layers.COMPUTE_DTYPES)
        layers.check_attention(self)

    @property
    def max_tokens(self) -> int:
        """Longest window, in input tokens."""
        return self.max_position_embeddings

    @property
    def layer_count(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def key_value_heads(self) -> int:
        """`num_key_value_heads` as resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """`head_dim` as resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, head = config.hidden_size, config.head_width
        linear = functools.partial(_linear, config, bias=config.attention_bias, rngs=rngs)
        self.q_proj = linear(width, config.num_attention_heads * head)
        self.k_proj = linear(width, config.key_value_heads * head)
        self.v_proj = linear(width, config.key_value_heads * head)
        self.o_proj = linear(config.num_attention_heads * head, width)
        self.head, self.implementation = head, config.attn_implementation

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).reshape(batch, length, -1, self.head)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        operands = (rotate(query, cos, sin), rotate(key, cos, sin), value)
        mixed = layers.causal_attention(*operands, self.implementation)
        return self.o_proj(mixed.reshape(batch, length, -1))


class FeedForward(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(_linear, config, bias=config.mlp_bias, rngs=rngs)
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """`x + self_attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = _norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _norm(config, rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaDecoder(nnx.Module):
    """Token ids `(B, S)` -> final hidden states `(B, S, hidden_size)`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        embed = functools.partial(
            nnx.Embed, config.vocab_size, config.hidden_size, embedding_init=normal, rngs=rngs
        )
        self.embed_tokens = embed()
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = embed()
        self.config = config

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # nnx.Embed would cast to the float32 in which it was made.
        x = layers.enter(self.embed_tokens.embedding[...][tokens], self.config.dtype)
        angles = rotary_angles(self.config, tokens.shape[1])
        # Tables in the dtype of x: float32 angles would promote bfloat16 queries.
        cos, sin = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
        return self.norm(layers.walk(self.layers, x, cos, sin, remat=self.config.remat))


def rotary_angles(config: LlamaConfig, length: int) -> np.ndarray:
    """`(length, head_width / 2)` float64 angles in radians: position times frequency.

    References:
      Su et al., 2021, equation 15; the scaling is that of Llama 3.1 ("llama3" in transformers).
    """
    half = np.arange(0, config.head_width, 2) / config.head_width
    frequency = 1.0 / config.rope_theta**half
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        band = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / band, 0.0, 1.0)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return np.arange(length)[:, None] * frequency


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channel i and i + d / 2 of each head by the angle of its position.

    Args:
      x: `(B, S, H, d)`.
      cos: `(S, d / 2)`.
      sin: `(S, d / 2)`.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _linear(
    config: LlamaConfig, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs
) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    dtype = layers.layer_dtype(config.dtype)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
