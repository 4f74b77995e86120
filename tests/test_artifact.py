"""Whatever bytes come in: the scorer that was stored, or ScorerRejected with a reason."""

import hashlib
import json
import math
import struct
import tracemalloc

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
    dtype=st.sampled_from(["int8", "float16", "float32"]),
    orders=st.integers(1, 3),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**16),
    strength=st.sampled_from([0.0, 0.5, math.inf]),
    pad_id=st.sampled_from([None, 0, -1]),
)
def test_a_scorer_survives_the_round_trip(deep, dtype, orders, bits, seed, strength, pad_id):
    options = {"strength": strength, "pad_id": pad_id, "orders": orders}
    scorer = make_scorer(seed, deep=deep, bits=bits, **options).quantized(dtype)
    payload, manifest = artifact.dump(scorer)
    assert artifact.dump(scorer) == (payload, manifest)
    loaded = artifact.load(payload, artifact.parse_manifest(canonical_json(manifest)))
    windows = make_windows(10)
    assert loaded.score(windows).tobytes() == scorer.score(windows).tobytes()
    assert (loaded.strength, loaded.pad_id, loaded.metadata) == (strength, pad_id, {"seed": seed})
    assert loaded.fields() == scorer.fields() and loaded.table.dtype == dtype


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


def test_a_scorer_without_finite_scores_is_refused_when_it_is_stored():
    with pytest.raises(ConfigError, match="golden windows"):
        artifact.dump(make_scorer(table=np.full((64, 1), 3e38, np.float32)))


def test_a_scorer_of_the_large_preset_can_be_stored():
    rng = np.random.default_rng(0)
    table = rng.integers(-127, 128, (2**20, 32)).astype(np.int8)
    scorer = make_scorer(1, deep=True, table=table, **{
        "skip": np.ones(32, np.float32), "hidden_kernel": np.ones((32, 40), np.float32)
    })  # fmt: skip
    payload, manifest = artifact.dump(scorer)
    assert 2**25 < len(payload) < 2**25 + 2**16
    assert artifact.load(payload, manifest).fields() == scorer.fields()


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


def test_ten_thousand_random_bit_flips_are_rejected():
    payload, manifest = stored(deep=True)
    together = payload + manifest
    rng = np.random.default_rng(0)
    for position, byte in zip(
        rng.integers(0, len(together) * 8, 10_000), rng.integers(1, 256, 10_000)
    ):
        changed = bytearray(together)
        # One bit, and then the whole byte of another place.
        changed[position // 8] ^= 1 << int(position) % 8
        assert rejected(bytes(changed[: len(payload)]), bytes(changed[len(payload) :])), position
        changed[(position // 8 + 1) % len(changed)] ^= int(byte)
        assert rejected(bytes(changed[: len(payload)]), bytes(changed[len(payload) :])), position


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


def entry(dtype: str, shape: list, begin: object, end: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SCALE, SKIP = entry("F32", [1], 256, 260), entry("F32", [1], 260, 264)
TABLE = entry("F32", [64, 1], 0, 256)
GOOD = {"table": TABLE, "scale": SCALE, "skip": SKIP}
ONE = np.ones(1, np.float32)


def with_entry(name: str, value: object) -> bytes:
    return framed(GOOD | {name: value}) + bytes(264)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (lambda: tensors(table=np.full((64, 1), np.nan, np.float32)), "non_finite"),
        (lambda: tensors(table=np.full((64, 1), np.inf, np.float32)), "non_finite"),
        (lambda: tensors(scale=np.full(1, np.nan, np.float32)), "non_finite"),
        (lambda: tensors(table=np.zeros((64, 1))), "tensors"),
        (lambda: tensors(table=np.zeros((64, 1), np.float16)), "tensors"),
        (lambda: tensors(table=np.zeros((1, 64), np.float32)), "tensors"),
        (lambda: tensors(table=np.zeros((128, 1), np.float32)), "tensors"),
        (lambda: tensors(table=np.zeros((64, 1), np.float32)), "golden"),
        (lambda: tensors(table=np.full((64, 1), 1e-45, np.float32)), "golden"),
        (lambda: tensors(extra=ONE), "tensors"),
        (lambda: tensors(scale=None), "tensors"),
        (lambda: tensors(scale=2 * ONE), "fields"),
        (lambda: b"", "header"),
        (lambda: b"\x80\x04K\x01.", "header"),
        (lambda: struct.pack("<Q", 2**63) + b"{}", "header"),
        (lambda: struct.pack("<Q", 2**17) + b" " * 2**18, "header"),
        (lambda: framed({}), "tensors"),
        (lambda: framed([]), "tensors"),
        (lambda: framed({"table": 3, "scale": None, "skip": 0}), "malformed"),
        (lambda: struct.pack("<Q", 60000) + b"[" * 60000, "malformed"),
        (lambda: framed(GOOD), "tensors"),
        (lambda: framed(GOOD) + bytes(256) + ONE.tobytes() * 2, "golden"),
        (lambda: framed(GOOD) + bytes(265), "tensors"),
        (lambda: with_entry("__metadata__", {}), "tensors"),
        (lambda: with_entry("table", entry("F32", [2**62, 4], 0, 256)), "tensors"),
        (lambda: with_entry("table", entry("F32", [64, 1], 0, 2**70)), "tensors"),
        (lambda: with_entry("table", entry("F32", [64, 1], -8, 248)), "tensors"),
        (lambda: with_entry("table", entry("F32", [64, 1], 0.0, "x")), "malformed"),
        (lambda: with_entry("table", entry("F32", [64, True], 0, 256)), "malformed"),
        (lambda: with_entry("skip", SCALE), "tensors"),
        (lambda: with_entry("skip", entry("F32", [1], 264, 268)) + bytes(4), "tensors"),
        (lambda: repeated("skip"), "tensors"),
        (lambda: framed({str(i): TABLE for i in range(500_000)}), "header"),
    ],
)  # fmt: skip
def test_a_hostile_payload_with_right_hashes_is_rejected(payload, reason):
    data = payload()
    tracemalloc.start()
    try:
        assert resealed(data) == reason
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Nothing is allocated for what a header merely claims.
    assert peak < 2**20 + 2 * len(data)


def repeated(name: str) -> bytes:
    """A header that names a tensor twice."""
    text = json.dumps(GOOD)[:-1] + ", " + json.dumps({name: GOOD[name]})[1:]
    return struct.pack("<Q", len(text)) + text.encode() + bytes(264)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 1}, "format"),
        ({"format": 3}, "format"),
        ({"format": True}, "format"),
        ({"kind": "series"}, "fields"),
        ({"kind": "image"}, "fields"),
        ({"kind": ["text"]}, "fields"),
        ({"strength": -1}, "fields"),
        ({"strength": "nan"}, "fields"),
        ({"metadata": []}, "fields"),
        ({"fields": []}, "fields"),
        ({"fields": {}}, "fields"),
        ({"golden": []}, "golden"),
        ({"golden": [0.0] * 8}, "golden"),
        ({"golden": [0.0] * 9}, "golden"),
        ({"golden": ["x"] * 8}, "malformed"),
        ({"golden": [None] * 8}, "malformed"),
        ({"tensors": {}}, "tensors"),
        ({"tensors": {"table": ["float32", [64, 1]]}}, "tensors"),
        ({"tensors": {name: ["object", [1]] for name in GOOD}}, "tensors"),
        ({"tensors": {name: [[], [1]] for name in GOOD}}, "malformed"),
        ({"tensors": 3}, "malformed"),
        ({"unknown": 1}, "fields"),
    ],
)  # fmt: skip
def test_hostile_fields_with_right_hashes_are_rejected(changes, reason):
    assert resealed(tensors(), **changes) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 0}, "fields"),
        ({"vocab_size": "9"}, "fields"),
        ({"hash_seed": 1}, "golden"),
        ({"hash_seed": 2**32}, "fields"),
        ({"orders": 1}, "golden"),
        ({"orders": 4}, "fields"),
        ({"orders": True}, "fields"),
        ({"pad_id": "0"}, "fields"),
        ({"bias": 0.5}, "golden"),
        ({"bias": None}, "fields"),
        ({"bias": 10**400}, "fields"),
        ({"bits": 7}, "fields"),
        ({"strength": 1.0}, "fields"),
        ({"table": []}, "fields"),
    ],
)
def test_hostile_scalars_with_right_hashes_are_rejected(changes, reason):
    assert resealed(tensors(), fields=make_scorer().fields() | changes) == reason


def test_tensors_of_another_shape_are_rejected():
    payload = tensors(table=np.zeros((63, 1), np.float32))
    changed = {name: ["float32", [1]] for name in GOOD} | {"table": ["float32", [63, 1]]}
    assert resealed(payload, tensors=changed) == "fields"
    payload = tensors(scale=None)
    changed = {"table": ["float32", [64, 1]], "skip": ["float32", [1]]}
    assert resealed(payload, tensors=changed) == "fields"


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
