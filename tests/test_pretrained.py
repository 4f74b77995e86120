"""Checkpoints load exactly what they describe, and are refused by name otherwise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.proxy import (
    DecoderConfig,
    DecoderLoss,
    LlamaConfig,
    RopeScaling,
    init_decoder,
    load_pretrained,
    save_pretrained,
)
from metagrad_filter.proxy.families import read_config, write_config

SCALING = RopeScaling(8.0, 1.0, 4.0, 8)
CONFIGS = {
    "gpt2": DecoderConfig(13, 8, 4, 2, 2, activation_function="relu2", n_inner=6),
    "gpt2 untied": DecoderConfig(13, 8, 4, 1, 2, tie_word_embeddings=False),
    "llama": LlamaConfig(
        13, 8, 6, 2, 4, 2, max_position_embeddings=16, rms_norm_eps=1e-6, rope_theta=500.0
    ),
    "llama, all options": LlamaConfig(
        13,
        8,
        6,
        2,
        2,
        1,
        head_dim=6,
        max_position_embeddings=16,
        hidden_act="gelu",
        rope_scaling=SCALING,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
}
# As published; the keys that say where a file came from are shortened.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "eos_token_id": [128001, 128008],
    "tie_word_embeddings": True,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    config = CONFIGS[request.param]
    params = init_decoder(config, seed=5)
    save_pretrained(tmp_path, DecoderLoss(config), params)
    return config, params, tmp_path


@pytest.fixture
def llama(tmp_path):
    config = CONFIGS["llama"]
    save_pretrained(tmp_path, config, init_decoder(config))
    return tmp_path


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_is_saved_is_what_loads(saved):
    config, params, folder = saved
    found = load_pretrained(folder)
    assert found.config == config and found.loss == DecoderLoss(config)
    assert hash(found.loss) == hash(DecoderLoss(config))
    assert_same(found.params, params)
    before = (folder / "model.safetensors").read_bytes()
    save_pretrained(folder, found.loss, found.params)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_names_and_orientations_are_those_of_transformers(tmp_path):
    save_pretrained(tmp_path, CONFIGS["llama"], init_decoder(CONFIGS["llama"]))
    shapes = {
        name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (4, 8)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (8, 6)
    assert shapes["model.norm.weight"] == (8,) and len(shapes) == 2 + 2 * 9
    save_pretrained(tmp_path, CONFIGS["gpt2"], init_decoder(CONFIGS["gpt2"]))
    shapes = {
        name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    # Linear layers of GPT-2 are stored (inputs, outputs).
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (4, 12)
    assert shapes["transformer.h.1.mlp.c_proj.weight"] == (6, 4)
    assert shapes["transformer.wpe.weight"] == (8, 4) and len(shapes) == 4 + 2 * 12


def test_bfloat16_is_read_and_written_bit_for_bit(tmp_path):
    config = CONFIGS["llama"]
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_decoder(config, seed=2))
    save_pretrained(tmp_path, config, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(load_pretrained(tmp_path, dtype="bfloat16").params, params)
    widened = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    assert_same(load_pretrained(tmp_path).params, widened)


def test_names_without_prefix_buffers_and_a_tied_copy_are_taken(tmp_path):
    config = CONFIGS["gpt2"]
    params = init_decoder(config)
    save_pretrained(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8), "lm_head.weight": bare["wte.weight"]}
    save_file(bare, tmp_path / "model.safetensors")
    assert_same(load_pretrained(tmp_path).params, params)
    save_file(bare | {"lm_head.weight": bare["wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head.weight differs from wte.weight"):
        load_pretrained(tmp_path)


def shard(folder, table=None):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for i, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-0000{1 + i % 2}-of-00002.safetensors", {})[name] = tensors[name]
    for file, content in files.items():
        save_file(content, folder / file)
    table = table or {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return table


def test_shards_load_as_one(saved):
    config, params, folder = saved
    shard(folder)
    found = load_pretrained(folder)
    assert found.config == config
    assert_same(found.params, params)


def test_an_index_does_not_lead_elsewhere(llama):
    table = shard(llama)
    name = next(iter(table))
    index = llama / "model.safetensors.index.json"
    for file in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 3):
        index.write_text(json.dumps({"weight_map": table | {name: file}}))
        with pytest.raises(DataError, match="expected the name of a safetensors file"):
            load_pretrained(llama)
    index.write_text(json.dumps({"weight_map": table | {"ghost": table[name]}}))
    with pytest.raises(DataError, match="disagree on tensor 'ghost'"):
        load_pretrained(llama)
    index.write_text("{}")
    with pytest.raises(DataError, match="no weight_map"):
        load_pretrained(llama)


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(2, np.float32)


def reshape(tensors):
    tensors["model.embed_tokens.weight"] = np.ones((12, 8), np.float32)


def turn(tensors):
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def integers(tensors):
    tensors["model.norm.weight"] = np.ones(8, np.int8)


def poison(tensors):
    tensors["model.norm.weight"][3] = np.nan


def twice(tensors):
    tensors["norm.weight"] = tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing layers.1.mlp.up_proj.weight; unexpected none"),
        (add, r"missing none; unexpected layers.0.self_attn.q_norm.weight"),
        (reshape, r"embed_tokens.weight has shape \(12, 8\).*says \(13, 8\)"),
        (turn, r"down_proj.weight has shape \(6, 8\).*says \(8, 6\)"),
        (integers, r"norm.weight is of type int8"),
        (poison, r"norm.weight holds values that are not finite"),
        (twice, r"holds both 'model.norm.weight' and 'norm.weight'|both 'norm.weight'"),
        (dict.clear, r"holds 0 tensors for 2 layers"),
    ],
)
def test_tensors_that_do_not_belong_are_named(llama, change, message):
    edit_tensors(llama, change)
    with pytest.raises(DataError, match=message):
        load_pretrained(llama)


def test_a_layer_count_that_is_only_claimed_costs_nothing(llama):
    edit_config(llama, num_hidden_layers=10**9)
    with pytest.raises(DataError, match="20 tensors for 1000000000 layers"):
        load_pretrained(llama)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_weights_that_are_cut_off_are_refused(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        load_pretrained(llama)


def test_pickles_are_never_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(DataError, match="not read, because reading one can run code"):
        load_pretrained(llama)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_configuration_that_is_not_json_is_refused(llama, content):
    (llama / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config.json cannot be read as JSON"):
        load_pretrained(llama)


def test_published_configurations_are_read():
    smollm2 = read_config(SMOLLM2)
    assert isinstance(smollm2, LlamaConfig) and smollm2.tie_word_embeddings
    assert (smollm2.rope_theta, smollm2.key_value_heads, smollm2.head_width) == (100000, 3, 64)
    assert smollm2.max_tokens == 8192 and smollm2.rope_scaling is None
    llama3 = read_config(LLAMA3)
    assert isinstance(llama3, LlamaConfig)
    assert llama3.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    # Absent keys take the defaults of transformers, which are not ours.
    assert llama3.rms_norm_eps == 1e-6 and llama3.rope_theta == 500000.0
    assert read_config(GPT2) == DecoderConfig(50257)


def test_configurations_survive_the_way_out_and_back():
    for config in CONFIGS.values():
        found = read_config(json.loads(json.dumps(write_config(config, dtype="float32"))))
        assert found == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (SMOLLM2 | {"model_type": "mistral"}, r"model_type='mistral'.*\['gpt2', 'llama'\]"),
        (SMOLLM2 | {"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"hidden_size": 8}, "model_type=None"),
        (["llama"], r"model_type=\['llama'\]"),
        (SMOLLM2 | {"sliding_window": 512}, "key 'sliding_window' .value 512"),
        (SMOLLM2 | {"qk_norm": True}, "key 'qk_norm'"),
        (GPT2 | {"rope_theta": 1e4}, "key 'rope_theta'.*'gpt2'"),
        (
            GPT2 | {"scale_attn_by_inverse_layer_idx": True},
            "inverse_layer_idx=True.*expected False",
        ),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=False.*expected True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2 | {"activation_function": "tanh"}, "activation_function='tanh'.*gelu_new"),
        (GPT2 | {"n_head": 7}, "n_embd=768.*n_head=7"),
        (GPT2 | {"n_layer": "12"}, "not a GPT2Config"),
        (SMOLLM2 | {"hidden_act": "swish_glu"}, "hidden_act='swish_glu'"),
        (SMOLLM2 | {"rope_interleaved": True}, "rope_interleaved=True"),
        (SMOLLM2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (SMOLLM2 | {"quantization_config": {"bits": 4}}, "quantization_config="),
        (SMOLLM2 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        (
            SMOLLM2 | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type='yarn'.*'llama3'",
        ),
        (SMOLLM2 | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (
            SMOLLM2 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mscale": 2}},
            "rotary key 'mscale'",
        ),
        (SMOLLM2 | {"vocab_size": -1}, "vocab_size=-1"),
        (SMOLLM2 | {"hidden_size": None}, "not a LlamaConfig"),
    ],
)
def test_configurations_of_other_mathematics_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        read_config(values)


def test_sources_that_are_none_of_the_three_are_refused(tmp_path, llama):
    for source in ("", "a/b/c", str(tmp_path / "gone"), "../up", "name with spaces"):
        with pytest.raises(ConfigError, match="not a folder that exists"):
            load_pretrained(source)
    with pytest.raises(ConfigError, match="revision='v1' was given with the local source"):
        load_pretrained(llama, revision="v1")
    with pytest.raises(ConfigError, match=r"dtype='float16'; expected one of"):
        load_pretrained(llama, dtype="float16")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"config.json cannot be read"):
        load_pretrained(empty)


def test_hub_models_come_from_the_hubs_cache(llama, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (llama / name).rename(snapshot / name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        found = load_pretrained("someone/tiny", revision=revision)
        assert found.config == CONFIGS["llama"]
    with pytest.raises(DataError, match=r"'someone/other' \(revision main\).*hub did not give"):
        load_pretrained("someone/other")


def test_parameters_of_another_model_are_not_saved(tmp_path):
    params = init_decoder(CONFIGS["llama"])
    with pytest.raises(ConfigError, match=r"20 arrays.*LlamaConfig"):
        save_pretrained(tmp_path, CONFIGS["llama, all options"], params)
    wider = {**params, "norm": {"scale": jnp.ones(9)}}
    with pytest.raises(ConfigError, match=r"norm.weight has shape \(9,\).*\(8,\)"):
        save_pretrained(tmp_path, CONFIGS["llama"], wider)
    mixed = {**params, "norm": {"scale": jnp.ones(8, jnp.bfloat16)}}
    with pytest.raises(ConfigError, match=r"types \['bfloat16', 'float32'\]"):
        save_pretrained(tmp_path, CONFIGS["llama"], mixed)
    assert not list(tmp_path.iterdir())


def test_the_saved_file_says_what_it_holds(llama):
    with safetensors.safe_open(llama / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    values = json.loads((llama / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"] and values["bos_token_id"] is None
