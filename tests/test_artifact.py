"""Whatever bytes come in: the scorer that was stored, or ScorerRejected with a reason."""

import hashlib
import json
import math
import struct

import numpy as np
import pytest
import safetensors.numpy
from hotlane import make_scorer, make_windows
from hypothesis import given, settings
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError, ScorerRejected
from metagrad_filter.files import canonical_json
from metagrad_filter.scorer import artifact

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    deep=st.booleans(),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**16),
    strength=st.sampled_from([0.0, 0.5, math.inf]),
    pad_id=st.sampled_from([None, 0, -1]),
)
def test_a_scorer_survives_the_round_trip(deep, bits, seed, strength, pad_id):
    scorer = make_scorer(seed, deep=deep, bits=bits, strength=strength, pad_id=pad_id)
    payload, manifest = artifact.dump(scorer)
    assert artifact.dump(scorer) == (payload, manifest)
    loaded = artifact.load(payload, artifact.parse_manifest(canonical_json(manifest)))
    windows = make_windows(10)
    assert loaded.score(windows).tobytes() == scorer.score(windows).tobytes()
    assert (loaded.strength, loaded.pad_id, loaded.metadata) == (strength, pad_id, {"seed": seed})
    assert loaded.embedding_bits == scorer.embedding_bits


@given(json_values)
def test_metadata_of_any_json_value_survives(value):
    payload, manifest = artifact.dump(make_scorer(metadata={"value": value}))
    parsed = artifact.parse_manifest(canonical_json(manifest))
    assert artifact.load(payload, parsed).metadata == {"value": value}


@pytest.mark.parametrize("value", [math.nan, math.inf, (1, 2), {1: 2}, object(), np.float32(1)])
def test_metadata_that_is_not_json_is_refused_when_it_is_stored(value):
    with pytest.raises(ConfigError, match="metadata"):
        artifact.dump(make_scorer(metadata={"value": value}))


def test_a_scorer_over_the_size_limit_is_refused_when_it_is_stored():
    with pytest.raises(ConfigError, match="bytes"):
        artifact.dump(make_scorer(bits=24))


def rejected(payload: bytes, manifest: bytes) -> str | None:
    """Returns the reason, None if it was accepted; any other exception escapes."""
    try:
        artifact.load(payload, artifact.parse_manifest(manifest))
    except ScorerRejected as error:
        assert str(error)
        return error.reason
    return None


def stored(**fields) -> tuple[bytes, bytes]:
    payload, manifest = artifact.dump(make_scorer(**fields))
    return payload, canonical_json(manifest)


def test_every_truncation_is_rejected():
    payload, manifest = stored()
    for length in {*range(0, 16), *range(0, len(payload), 7), len(payload) - 1}:
        assert rejected(payload[:length], manifest) == "truncated"
    for length in {*range(0, 16), *range(0, len(manifest), 7), len(manifest) - 1}:
        assert rejected(payload, manifest[:length]) == "manifest"
    assert rejected(payload + b"\0", manifest) == "truncated"
    assert rejected(payload, manifest + b" ") == "manifest"


def test_every_single_bit_flip_is_rejected():
    payload, manifest = stored()
    for data, assemble in [
        (payload, lambda d: (d, manifest)),
        (manifest, lambda d: (payload, d)),
    ]:
        # Every third bit: 3 does not divide 8, so every bit of the byte has its turn.
        for position in range(0, len(data) * 8, 3):
            changed = bytearray(data)
            changed[position // 8] ^= 1 << position % 8
            assert rejected(*assemble(bytes(changed))) is not None, position


@settings(max_examples=200)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_arbitrary_bytes_are_rejected(payload, manifest):
    assert rejected(payload, manifest) is not None


@settings(max_examples=100)
@given(json_values)
def test_arbitrary_json_is_rejected(value):
    assert rejected(b"", canonical_json(value)) is not None
    sealed = artifact.seal(value) if isinstance(value, dict) else {}
    assert rejected(b"", canonical_json(sealed)) is not None


def resealed(payload: bytes, **changes) -> str | None:
    """The reason for a payload and fields whose hashes a hostile publisher has recomputed."""
    _, manifest = artifact.dump(make_scorer())
    manifest |= {"payload_bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    return rejected(payload, canonical_json(artifact.seal(manifest | changes)))


def tensors(**changes) -> bytes:
    payload, _ = artifact.dump(make_scorer())
    content = safetensors.numpy.load(payload) | changes
    return safetensors.numpy.save({k: v for k, v in content.items() if v is not None})


def test_the_hostile_publisher_helper_is_accepted_without_changes():
    assert resealed(tensors()) is None


def framed(header: object) -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (lambda: tensors(linear=np.full(64, np.nan, np.float32)), "non_finite"),
        (lambda: tensors(linear=np.full(64, np.inf, np.float32)), "non_finite"),
        (lambda: tensors(linear=np.zeros(64)), "tensors"),
        (lambda: tensors(linear=np.zeros(64, np.float16)), "tensors"),
        (lambda: tensors(linear=np.zeros((1, 64), np.float32)), "tensors"),
        (lambda: tensors(linear=np.zeros(128, np.float32)), "tensors"),
        (lambda: tensors(linear=np.zeros(64, np.float32)), "golden"),
        (lambda: tensors(extra=np.zeros(1, np.float32)), "tensors"),
        (lambda: tensors(golden_windows=None), "tensors"),
        (lambda: tensors(golden_windows=np.full((8, 32), 100, np.int32)), "malformed"),
        (lambda: b"", "header"),
        (lambda: b"\x80\x04K\x01.", "header"),
        (lambda: struct.pack("<Q", 2**63) + b"{}", "header"),
        (lambda: struct.pack("<Q", 2**17) + b" " * 2**18, "header"),
        (lambda: framed({}), "tensors"),
        (lambda: framed([]), "tensors"),
        (lambda: framed({"linear": 3, "golden_windows": None}), "malformed"),
        (lambda: struct.pack("<Q", 60000) + b"[" * 60000, "malformed"),
        (
            lambda: framed(
                {
                    "linear": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]},
                    "golden_windows": {"dtype": "I32", "shape": [8, 32], "data_offsets": [0, 1024]},
                }
            )
            + bytes(1024),
            "malformed",
        ),
    ],
)  # fmt: skip
def test_a_hostile_payload_with_right_hashes_is_rejected(payload, reason):
    assert resealed(payload()) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format"),
        ({"format": True}, "format"),
        ({"kind": "series"}, "fields"),
        ({"bits": 7}, "fields"),
        ({"bits": "6"}, "fields"),
        ({"bits": 10**400}, "fields"),
        ({"embedding_bits": 5}, "fields"),
        ({"vocab_size": 0}, "fields"),
        ({"hash_seed": 1}, "golden"),
        ({"pad_id": "0"}, "fields"),
        ({"bias": 0.5}, "golden"),
        ({"bias": None}, "fields"),
        ({"strength": -1}, "fields"),
        ({"strength": "nan"}, "fields"),
        ({"metadata": []}, "fields"),
        ({"golden": []}, "golden"),
        ({"golden": [0.0] * 8}, "golden"),
        ({"golden": ["x"] * 8}, "malformed"),
        ({"tensors": {}}, "tensors"),
        ({"tensors": {"linear": ["float32", [64]]}}, "tensors"),
        ({"tensors": {"linear": ["object", [64]], "golden_windows": ["int32", [8]]}}, "tensors"),
        ({"tensors": 3}, "malformed"),
        ({"unknown": 1}, "fields"),
    ],
)  # fmt: skip
def test_hostile_fields_with_right_hashes_are_rejected(changes, reason):
    assert resealed(tensors(), **changes) == reason


def test_golden_scores_may_differ_by_rounding_only():
    golden = artifact.dump(make_scorer())[1]["golden"]
    assert resealed(tensors(), golden=[g + 5e-6 for g in golden]) is None
    assert resealed(tensors(), golden=[g + 5e-5 for g in golden]) == "golden"


def test_sizes_are_checked_before_anything_is_read():
    _, manifest = stored()
    assert rejected(b"", b" " * (artifact.MAX_MANIFEST_BYTES + 1)) == "manifest_size"
    assert rejected(bytes(artifact.MAX_PAYLOAD_BYTES + 1), manifest) == "payload_size"
    deep = b"[" * 100_000 + b"]" * 100_000
    assert rejected(b"", deep) == "manifest"
