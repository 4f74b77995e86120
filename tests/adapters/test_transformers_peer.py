"""Our decoders against those of transformers: equal numbers from equal files, in both directions.

Needs torch, which the default run does not have.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from metagrad_filter.proxy import DecoderLoss, load_pretrained, save_pretrained  # noqa: E402

GPT2: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
UNGROUPED: dict[str, Any] = LLAMA | {"num_key_value_heads": 6}
# Wavelengths on both sides of the two bounds and between them.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2 relu2, narrow": transformers.GPT2Config(
        **GPT2, activation_function="relu2", n_inner=24, layer_norm_epsilon=1e-3
    ),
    "gpt2 untied": transformers.GPT2Config(**GPT2, tie_word_embeddings=False),
    "llama untied": transformers.LlamaConfig(**LLAMA),
    "llama tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama without groups": transformers.LlamaConfig(**UNGROUPED),
    "llama3 rope": transformers.LlamaConfig(
        **LLAMA | {"hidden_size": 96, "rope_parameters": dict(LLAMA3_ROPE)}
    ),
    "llama biases": transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "llama head_dim": transformers.LlamaConfig(**LLAMA, head_dim=8, hidden_act="gelu"),
}


@pytest.fixture(scope="module", params=CASES)
def peer(request, tmp_path_factory):
    """A model of transformers with parameters far from their initial ones, and its folder."""
    torch.manual_seed(0)
    config = CASES[request.param]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder)
    return model, folder


def peer_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def some_tokens(shape):
    return np.random.default_rng(0).integers(0, 61, shape).astype(np.int32)


def close(found, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def test_logits_and_losses_are_those_of_transformers(peer):
    model, folder = peer
    ours = load_pretrained(folder)
    tokens = some_tokens((3, 20))
    expected = peer_logits(model, tokens)
    close(ours.loss.logits(ours.params, tokens), expected)
    found = ours.loss.token_losses(ours.params, jnp.asarray(tokens))
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(expected[:, :-1]).transpose(1, 2),
        torch.from_numpy(tokens[:, 1:]).long(),
        reduction="none",
    )
    close(found, losses.numpy())
    close(ours.loss(ours.params, jnp.asarray(tokens)), losses.numpy().mean(axis=1))


def test_gradients_are_those_of_transformers(peer):
    model, folder = peer
    ours = load_pretrained(folder)
    tokens = some_tokens((3, 20))
    labels = torch.from_numpy(tokens).long()
    model.zero_grad()
    model(labels, labels=labels).loss.backward()
    gradient = jax.grad(lambda p: ours.loss(p, jnp.asarray(tokens)).mean())(ours.params)
    save_pretrained(folder / "gradient", ours.loss, gradient)
    with transformers_tensors(folder / "gradient") as tensors:
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(tensors.keys()) == set(expected)
        for name, value in expected.items():
            close(tensors.get_tensor(name), value.numpy())


def transformers_tensors(folder):
    import safetensors

    return safetensors.safe_open(folder / "model.safetensors", framework="numpy")


def test_transformers_loads_what_we_save(peer, tmp_path):
    model, folder = peer
    ours = load_pretrained(folder)
    save_pretrained(tmp_path, ours.config, ours.params)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = some_tokens((2, 24))
    np.testing.assert_array_equal(peer_logits(again.eval(), tokens), peer_logits(model, tokens))
    for (name, before), (same, after) in zip(model.named_parameters(), again.named_parameters()):
        assert name == same and torch.equal(before, after), name


def test_bfloat16_checkpoints_are_read_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "peer", max_shard_size="5KB")
    assert (tmp_path / "peer" / "model.safetensors.index.json").exists()
    ours = load_pretrained(tmp_path / "peer", dtype="bfloat16")
    save_pretrained(tmp_path / "ours", ours.config, ours.params)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for (name, before), (_, after) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(before, after), name
    # float32 arithmetic on the same parameters, there and here.
    tokens = some_tokens((2, 24))
    close(ours.loss.logits(ours.params, tokens), peer_logits(model.float(), tokens))
    # bfloat16 arithmetic differs by its rounding, which is 2 ** -9 an operation.
    low = DecoderLoss(dataclasses.replace(ours.config, dtype="bfloat16"))
    expected = peer_logits(model, tokens)
    assert np.abs(low.logits(ours.params, tokens) - expected).max() < 0.03 * np.abs(expected).max()
