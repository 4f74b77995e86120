"""Configurations of `transformers` as ours and back; a key is known or the file is refused.

Answers "does this config.json describe exactly the mathematics that is implemented here?". Each key
is one of three: a field of ours, a key that must have one value because another would change the
mathematics, or a key without effect on a deterministic forward pass. Any other key is refused by
name, so a new variant of a family can never load as an old one. Input and output are JSON values;
no file is touched and torch is not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metagrad_filter.errors import ConfigError
from metagrad_filter.proxy.decoder import DecoderConfig
from metagrad_filter.proxy.llama import LlamaConfig, RopeScaling
from metagrad_filter.proxy.loss import AnyConfig


@dataclass(frozen=True)
class Family:
    """How one family of `transformers` corresponds to ours.

    Attributes:
      config: our configuration; its fields other than `_OURS` are keys of the same name.
      peer: name of the configuration class in `transformers`.
      architecture: name of the language model there.
      prefix: what tensor names of the language model begin with, the output layer's excepted.
      transposed: linear layers are stored `(outputs, inputs)`, the transpose of flax.
      fixed: key -> the values that leave the mathematics as implemented.
      ignored: keys without effect on the mathematics.
      buffers: pattern of tensors that are computed from the configuration, not learned.
    """

    config: type[DecoderConfig] | type[LlamaConfig]
    peer: str
    architecture: str
    prefix: str
    transposed: bool
    fixed: Mapping[str, tuple[Any, ...]]
    ignored: frozenset[str]
    buffers: str


# How it is computed here, and what transformers spells in another way.
_OURS = frozenset({"remat", "dtype", "attn_implementation", "rope_theta", "rope_scaling"})
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

# Another value of these changes what a tensor or a position means, in any family.
_FIXED = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
    "is_decoder": (True, False),  # a causal language model is causal with either
}
_IGNORED = frozenset(
    key
    for line in (
        # Where the file came from and how it is stored.
        "architectures model_type transformers_version _name_or_path name_or_path _commit_hash",
        "dtype torch_dtype torchscript auto_map transformers.js_config tokenizer_class prefix",
        # What a call returns and what it keeps between calls.
        "use_cache return_dict use_return_dict output_attentions output_hidden_states",
        "_attn_implementation attn_implementation gradient_checkpointing",
        # Special tokens and generation: a loss sees token ids only.
        "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id",
        "do_sample max_length min_length max_new_tokens temperature top_k top_p num_beams",
        "repetition_penalty task_specific_params",
        # Heads of classifiers, whose tensors would be refused.
        "id2label label2id num_labels problem_type finetuning_task",
    )
    for key in line.split()
)
# Dropout is off in metagradients: the trajectory that is differentiated is deterministic.
_DROPOUT = frozenset({"resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"})
_SUMMARY = frozenset(
    f"summary_{key}" for key in ("type", "use_proj", "activation", "proj_to_labels")
) | {"summary_first_dropout"}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        config=DecoderConfig,
        peer="GPT2Config",
        architecture="GPT2LMHeadModel",
        prefix="transformer",
        transposed=False,
        fixed=_FIXED | {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        # reorder_and_upcast_attn is about rounding; softmax is in float32 here anyway.
        ignored=_IGNORED | _DROPOUT | _SUMMARY | {"reorder_and_upcast_attn", "n_ctx"},
        buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "llama": Family(
        config=LlamaConfig,
        peer="LlamaConfig",
        architecture="LlamaForCausalLM",
        prefix="model",
        transposed=True,
        fixed=_FIXED | {"rope_interleaved": (False,), "partial_rotary_factor": (None, 1, 1.0)},
        # pretraining_tp splits matrix products, which changes their rounding only.
        ignored=_IGNORED | _DROPOUT | {"pretraining_tp", "is_llama_config"},
        buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
}


def family_of(config: AnyConfig) -> Family:
    """The family that one of our configurations belongs to."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))


def read_config(values: Mapping[str, Any], *, where: str = "config.json") -> AnyConfig:
    """Our configuration of what a `config.json` describes.

    Args:
      values: the decoded file.
      where: what messages call it.

    Raises:
      ConfigError: another model type, an unknown key, or a value that is not implemented.
    """
    if not isinstance(values, Mapping) or values.get("model_type") not in FAMILIES:
        seen = values.get("model_type") if isinstance(values, Mapping) else values
        raise ConfigError(
            f"{where} has model_type={seen!r}; expected one of {sorted(FAMILIES)}. Other families "
            "differ in their mathematics, so none is loaded as one of these."
        )
    family = FAMILIES[values["model_type"]]
    names = {field.name for field in dataclasses.fields(family.config)} - _OURS
    rope = _ROPE if family.config is LlamaConfig else frozenset()
    for key in sorted(values):
        if key in family.fixed:
            if values[key] not in family.fixed[key]:
                raise ConfigError(
                    f"{where} has {key}={values[key]!r}, which is not implemented; expected "
                    f"{family.fixed[key][0]!r}. Use another checkpoint."
                )
        elif key not in names | rope | family.ignored:
            raise ConfigError(
                f"{where} has the key {key!r} (value {values[key]!r}), which is not known for "
                f"model_type={values['model_type']!r}; it may change the mathematics. Remove it if "
                "it does not."
            )
    # Absent keys take the defaults of transformers, which are not ours.
    full = _peer(family, {k: v for k, v in values.items() if k not in family.ignored}, where)
    fields = {name: full[name] for name in names if name in full}
    if family.config is LlamaConfig:
        fields |= _rope(full.get("rope_parameters") or {}, where)
    return family.config(**fields)


def write_config(config: AnyConfig, *, dtype: str) -> dict[str, Any]:
    """The JSON object from which `transformers` builds the same model.

    Args:
      config: of either family.
      dtype: of the stored parameters.
    """
    family = family_of(config)
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    if isinstance(config, LlamaConfig):
        rope = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
        if config.rope_scaling is not None:
            rope |= {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)
        values["rope_parameters"] = rope
    # The token ids of a checkpoint are not known here; the defaults are of another vocabulary.
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    values |= {"architectures": [family.architecture], "dtype": dtype}
    return _peer(family, values, "config")


def _peer(family: Family, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` as the class of transformers completes and validates them."""
    # Seconds to import, and needed only where a file is read or written.
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return getattr(transformers, family.peer)(**values).to_dict()
    except (StrictDataclassError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ConfigError(
            f"{where} is not a {family.peer} that transformers {transformers.__version__} takes "
            f"({error}). Correct the value."
        ) from error


def _rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of what transformers calls `rope_parameters`."""
    kind, scaling = values.get("rope_type", "default"), None
    known = {"rope_type", "type", "rope_theta"}
    if kind == "llama3":
        names = [field.name for field in dataclasses.fields(RopeScaling)]
        known |= set(names)
        scaling = RopeScaling(**{name: values[name] for name in names})
    elif kind != "default":
        raise ConfigError(
            f"{where} has rotary scaling of rope_type={kind!r}, which is not implemented; expected "
            "'default' or 'llama3'. Use another checkpoint."
        )
    if values.get("partial_rotary_factor") in (1, 1.0):
        known.add("partial_rotary_factor")
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"{where} has the rotary key {unknown[0]!r} (value {values[unknown[0]]!r}), which is "
            f"not implemented for rope_type={kind!r}. Use another checkpoint."
        )
    return {"rope_theta": values["rope_theta"], "rope_scaling": scaling}
