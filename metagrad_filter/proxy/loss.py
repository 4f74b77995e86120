"""A decoder as a pure function of its parameters: fresh ones, hidden states, loss per window.

Answers "what does calibration differentiate?": `DecoderLoss(config)`, a frozen value that is called
with parameters and windows. Parameters are a plain nested dict, so optax, safetensors and the
adjoint see nothing of nnx; names follow `transformers`, with the leaf names of flax (`kernel` and
`embedding` and `scale` where PyTorch says `weight`). Every function here is jit-, jvp- and
grad-transformable in any order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy import layers
from metagrad_filter.proxy.cross_entropy import token_cross_entropy
from metagrad_filter.proxy.decoder import Decoder, DecoderConfig
from metagrad_filter.proxy.llama import LlamaConfig, LlamaDecoder
from metagrad_filter.types import PyTree

AnyConfig: TypeAlias = DecoderConfig | LlamaConfig

# Family -> its module, and the name of its input embedding.
_FAMILIES = {DecoderConfig: (Decoder, "wte"), LlamaConfig: (LlamaDecoder, "embed_tokens")}


def init_decoder(config: AnyConfig, *, seed: int = 0) -> PyTree:
    """Fresh parameters of the decoder: nested dict of float32 arrays.

    Args:
      config: of either family.
      seed: decides every parameter.

    Raises:
      ConfigError: `config` is of another type.
    """
    model = _family(config)[0]
    _, params = nnx.split(model(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return nnx.to_pure_dict(params)


def param_shapes(config: AnyConfig) -> PyTree:
    """The tree of `init_decoder` as `jax.ShapeDtypeStruct`; allocates no array."""
    return _abstract(config)[1]


@dataclass(frozen=True)
class DecoderLoss:
    """`loss(params, windows) -> (B,)`: mean nats per token of each window.

    `windows` are `(B, L)` int32 with `2 <= L <= config.max_tokens + 1`; each token but the first is
    predicted from those before it. A frozen value object, so that equal configurations share
    compiled programs and a worker process can be sent one.

    Attributes:
      config: shape of the decoder and how it is computed; `dataclasses.replace` gives the same
        model in another precision, or with less memory (`remat`).
    """

    config: AnyConfig

    def __post_init__(self):
        _family(self.config)

    def __call__(self, params: PyTree, windows: jax.Array) -> jax.Array:
        return self.token_losses(params, windows).mean(axis=1)

    def token_losses(self, params: PyTree, windows: jax.Array) -> jax.Array:
        """`(B, L - 1)` nats of each predicted token, in float32 or wider.

        Raises:
          ConfigError: the windows are too short or too long for this decoder.
        """
        count, length = windows.shape
        if not 2 <= length <= self.config.max_tokens + 1:
            raise ConfigError(
                f"windows hold {length} tokens; this decoder takes 2 to "
                f"{self.config.max_tokens + 1} (its longest input and one target)."
            )
        hidden = self.hidden(params, windows[:, :-1]).reshape(count * (length - 1), -1)
        losses = token_cross_entropy(hidden, self._output(params), windows[:, 1:].reshape(-1))
        return losses.reshape(count, -1)

    def hidden(self, params: PyTree, tokens: jax.Array) -> jax.Array:
        """`(B, S, D)` final hidden states after the last norm, in the compute dtype."""
        states = nnx.merge(_abstract(self.config)[0], params)(tokens)
        return layers.enter(states, self.config.dtype)

    def logits(self, params: PyTree, tokens: jax.Array) -> jax.Array:
        """`(B, S, V)` float32 (or wider) logits of the token after each position.

        For inspection: at `4 B S V` bytes they are what `token_losses` avoids.
        """
        hidden = self.hidden(params, tokens)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("bsd,vd->bsv", hidden, self._output(params), preferred_element_type=wide)

    def _output(self, params: PyTree) -> jax.Array:
        name = _family(self.config)[1] if self.config.tie_word_embeddings else "lm_head"
        return layers.enter(params[name]["embedding"], self.config.dtype)


@functools.lru_cache(maxsize=32)
def _abstract(config: AnyConfig) -> tuple[nnx.GraphDef, PyTree]:
    """The decoder without its parameters, and their shapes; a second for each 10 layers."""
    model = _family(config)[0]
    graph, shapes = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, nnx.to_pure_dict(shapes)


def _family(config: AnyConfig) -> tuple[Any, str]:
    if type(config) not in _FAMILIES:
        raise ConfigError(
            f"config is a {type(config).__name__}; expected a DecoderConfig (GPT-2) or a "
            "LlamaConfig of metagrad_filter.proxy."
        )
    return _FAMILIES[type(config)]
