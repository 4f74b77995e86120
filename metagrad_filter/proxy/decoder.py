"""A decoder language model of the GPT-2 family in flax.nnx, as a pure loss of its parameters.

Pre-norm blocks, learned positions, tied input and output embedding; field names follow
`transformers.GPT2Config`. Parameters are a plain nested dict, so optax, safetensors and the
adjoint see nothing of nnx.

Reference: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", section 2.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy.cross_entropy import token_cross_entropy
from metagrad_filter.types import PyTree

_ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder.

    Attributes:
      vocab_size: token ids are in [0, vocab_size).
      n_positions: longest window, in input tokens.
      n_embd: width of the residual stream.
      n_layer: number of blocks.
      n_head: attention heads; divides n_embd.
      activation_function: "gelu_new" (GPT-2) or "relu2" (squared ReLU, cheaper on CPU).
      layer_norm_epsilon: inside the root of every LayerNorm.
      initializer_range: standard deviation of the initial embeddings and kernels.
    """

    vocab_size: int
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected a positive integer.")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; change either."
            )
        if self.activation_function not in _ACTIVATIONS:
            raise ConfigError(
                f"activation_function={self.activation_function!r}; expected one of "
                f"{sorted(_ACTIVATIONS)}."
            )


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width = config.n_embd
        normal = nnx.initializers.normal(config.initializer_range)
        # GPT-2 scales what is added to the residual stream by the number of such additions.
        residual = nnx.initializers.normal(config.initializer_range / (2 * config.n_layer) ** 0.5)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=config.layer_norm_epsilon)
        self.ln_1 = norm(rngs=rngs)
        self.c_attn = nnx.Linear(width, 3 * width, kernel_init=normal, rngs=rngs)
        self.c_proj = nnx.Linear(width, width, kernel_init=residual, rngs=rngs)
        self.ln_2 = norm(rngs=rngs)
        self.c_fc = nnx.Linear(width, 4 * width, kernel_init=normal, rngs=rngs)
        self.c_out = nnx.Linear(4 * width, width, kernel_init=residual, rngs=rngs)
        self.heads = config.n_head
        self.activation = config.activation_function

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.c_attn(self.ln_1(x)).reshape(batch, length, 3, self.heads, -1)
        mixed = jax.nn.dot_product_attention(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True
        )
        x = x + self.c_proj(mixed.reshape(batch, length, width))
        return x + self.c_out(_ACTIVATIONS[self.activation](self.c_fc(self.ln_2(x))))


class Decoder(nnx.Module):
    """Token ids `(B, S)` -> final hidden states `(B, S, n_embd)`; the output layer is `wte`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        embed = functools.partial(nnx.Embed, features=config.n_embd, embedding_init=normal)
        self.wte = embed(config.vocab_size, rngs=rngs)
        self.wpe = embed(config.n_positions, rngs=rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.ln_f = nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


@functools.lru_cache(maxsize=32)
def _graph(config: DecoderConfig) -> nnx.GraphDef:
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graph


def init_decoder(config: DecoderConfig, *, seed: int = 0) -> PyTree:
    """Fresh parameters of the decoder: nested dict of float32 arrays."""
    _, params = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return nnx.to_pure_dict(params)


@dataclass(frozen=True)
class DecoderLoss:
    """`loss(params, windows) -> (B,)`: mean nats per token of each window.

    `windows` are `(B, L)` int32 with `2 <= L <= n_positions + 1`; each token but the first is
    predicted from those before it. A frozen value object, so that equal configurations share
    compiled programs and a worker process can be sent one.
    """

    config: DecoderConfig

    def __call__(self, params: PyTree, windows: jax.Array) -> jax.Array:
        count, length = windows.shape
        if not 2 <= length <= self.config.n_positions + 1:
            raise ConfigError(
                f"windows hold {length} tokens; this decoder takes 2 to "
                f"{self.config.n_positions + 1} (n_positions + 1)."
            )
        model = nnx.merge(_graph(self.config), params)
        hidden = model(windows[:, :-1]).reshape(count * (length - 1), -1)
        losses = token_cross_entropy(hidden, params["wte"]["embedding"], windows[:, 1:].reshape(-1))
        return losses.reshape(count, -1).mean(axis=1)
