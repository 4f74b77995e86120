"""Decoders of the Llama family from GGUF files, the format of llama.cpp.

Answers "how does a quantised model that ships in one file become a proxy?". Tensors are expanded to
floating point, the row order of the rotary projections is undone, and the metadata become a
`LlamaConfig`; every metadata key and every tensor is accounted for or the file is refused. Needs
the package `gguf` (extra `gguf`). Cost: some seconds for 135M parameters, half of them for the
tokenizer that the file also holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.proxy.llama import LlamaConfig
from metagrad_filter.proxy.tensors import assemble
from metagrad_filter.types import PyTree

# Metadata key (after "llama.") -> our field.
_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_REQUIRED = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
_REQUIRED += ("context_length", "attention.layer_norm_rms_epsilon")
# Checked against the rest, or without effect (see `_config`).
_CHECKED = ("vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.type")
# Name, licence and provenance; the tokenizer; how the file was quantised.
_IGNORED = ("GGUF.", "general.", "tokenizer.", "quantize.")

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path, *, dtype: str = "float32") -> tuple[LlamaConfig, PyTree]:
    """Reads one GGUF file.

    Args:
      path: the file.
      dtype: of the parameters, "float32" or "bfloat16".

    Returns:
      The configuration, and parameters as `init_decoder` makes them.

    Raises:
      ConfigError: the package `gguf` is not installed, or the model is of another architecture or
        has metadata that are not implemented.
      DataError: the file is missing or damaged, or its tensors are not those of its metadata.
    """
    try:
        from gguf import GGUFReader  # pyright: ignore
        from gguf.quants import dequantize  # pyright: ignore
    except ImportError as error:
        raise ConfigError(
            f"{path} is a GGUF file, and reading it needs a package that cannot be imported "
            f"({error}). Run `pip install 'metagrad-filter[gguf]'`."
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith(_IGNORED) or name == "general.architecture"
        }
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    # What the reader raises on damaged bytes depends on where the damage is.
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as GGUF ({error}). Get it anew.") from error
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise DataError(f"{path} holds no tensor token_embd.weight; get it anew.")
    # GGUF lists the fastest axis first.
    config = gguf_config(
        metadata,
        vocab_size=int(embedding.shape[-1]),
        tied="output.weight" not in tensors,
        where=str(path),
    )
    names = {peer_name(name): name for name in tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[names[name]]
        try:
            value = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise DataError(f"{path}: tensor {tensor.name}: {error}; use another file.") from error
        if name.endswith("q_proj.weight"):
            return restore_rotary_order(value, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return restore_rotary_order(value, config.key_value_heads)
        return value

    return config, assemble(config, list(names), read, dtype=dtype, where=str(path))


def gguf_config(
    metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, where: str
) -> LlamaConfig:
    """Our configuration of what the metadata describe.

    Args:
      metadata: key -> value; keys of provenance, tokenizer and quantisation may be left out.
      vocab_size: rows of the embedding.
      tied: the file holds no output layer of its own.
      where: what messages call the file.

    Raises:
      ConfigError: another architecture, a missing or unknown key, or a value that is not
        implemented.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{where} has general.architecture={architecture!r}; expected 'llama'. Other families "
            "differ in their mathematics, so none is loaded as this one."
        )
    values = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if not key.startswith(_IGNORED)
    }
    if missing := [key for key in _REQUIRED if key not in values]:
        raise ConfigError(f"{where} has no metadata key 'llama.{missing[0]}'; get it anew.")
    if unknown := sorted(values.keys() - _FIELDS.keys() - set(_CHECKED)):
        raise ConfigError(
            f"{where} has the metadata key {unknown[0]!r} (value {values[unknown[0]]!r}), which is "
            "not known; it may change the mathematics. Use another file."
        )
    fields = {field: values[key] for key, field in _FIELDS.items() if key in values}
    config = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **fields)
    for key, expected in (
        ("vocab_size", vocab_size),
        ("rope.dimension_count", config.head_width),
        ("attention.value_length", config.head_width),
        ("rope.scaling.type", "none"),
    ):
        if values.get(key, expected) != expected:
            raise ConfigError(
                f"{where} has {key}={values[key]!r}, which is not implemented; expected "
                f"{expected!r}. Use another file."
            )
    return config


def peer_name(name: str) -> str:
    """The name in transformers of a GGUF tensor; unknown names stay, to be refused by name."""
    stem, _, leaf = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{leaf}"
    if (block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and block[2] in _BLOCK_NAMES:
        return f"layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{leaf}"
    return name


def restore_rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of rotary rows.

    llama.cpp turns channels 2 i and 2 i + 1 of a head, transformers i and i + d / 2.

    Args:
      weight: `(heads * d, inputs)`.
      heads: heads of this projection.
    """
    rows, inputs = weight.shape
    if rows % (2 * heads):
        return weight  # of another shape than its metadata say; refused by name later
    pairs = weight.reshape(heads, rows // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(rows, inputs)
