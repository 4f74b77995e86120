"""A scorer as bytes: safetensors payload + JSON manifest, verified before anything uses it.

    dump(scorer)            -> payload bytes, manifest dict
    load(payload, manifest) -> Scorer, or ScorerRejected with a one-word reason

The manifest names every tensor with dtype and shape, the payload's SHA-256, and the scores of
eight golden windows that travel in the payload; it ends with a SHA-256 over itself. `load` checks
in the order in which a check is cheap and safe: sizes, hashes, header, tensors, finiteness, golden
scores. Nothing in it can run, and whatever bytes come in, the only exception is `ScorerRejected`.

Read next: `registry.py` (where the two files live).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from metagrad_filter.errors import ConfigError, MetagradFilterError, ScorerRejected
from metagrad_filter.files import canonical_json
from metagrad_filter.scorer.features import ngram_rows
from metagrad_filter.scorer.scorer import Scorer

FORMAT = 1
MAX_PAYLOAD_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 2**20
MAX_HEADER_BYTES = 64 * 2**10
GOLDEN_COUNT = 8
GOLDEN_LENGTH = 32
GOLDEN_TOLERANCE = 1e-5

_GOLDEN = "golden_windows"
_FIELDS = {
    "format", "kind", "vocab_size", "bits", "embedding_bits", "hash_seed", "pad_id", "bias",
    "strength", "tensors", "payload_bytes", "sha256", "golden", "metadata", "manifest_sha256",
}  # fmt: skip
_SAFETENSORS_DTYPES = {"float32": "F32", "int32": "I32"}


def dump(scorer: Scorer) -> tuple[bytes, dict[str, Any]]:
    """Encodes a scorer.

    Args:
      scorer: any valid scorer whose tensors fit 64 MiB.

    Returns:
      The safetensors payload and the manifest (JSON types only). Raises `ConfigError` when the
      payload is too large or the metadata is not JSON.
    """
    golden = golden_windows(scorer.vocab_size, scorer.hash_seed)
    tensors = scorer.tensors() | {_GOLDEN: golden}
    payload = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ConfigError(
            f"The scorer takes {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} can be published; "
            "fit with fewer bits or a narrower embedding."
        )
    manifest = {
        "format": FORMAT,
        "kind": scorer.kind,
        "vocab_size": scorer.vocab_size,
        "bits": scorer.bits,
        "embedding_bits": scorer.embedding_bits,
        "hash_seed": scorer.hash_seed,
        "pad_id": scorer.pad_id,
        "bias": float(scorer.bias),
        "strength": "inf" if math.isinf(scorer.strength) else float(scorer.strength),
        "tensors": {k: [str(v.dtype), list(v.shape)] for k, v in tensors.items()},
        "payload_bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
        "golden": [float(s) for s in scorer.score(golden)],
        "metadata": scorer.metadata,
    }
    try:
        sealed = seal(manifest)
        if json.loads(canonical_json(sealed)) != sealed:
            raise ValueError("it changes on the way through JSON, for instance a tuple or int key")
        if len(canonical_json(sealed)) > MAX_MANIFEST_BYTES:
            raise ValueError(f"the manifest exceeds {MAX_MANIFEST_BYTES} bytes")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The scorer's metadata cannot be stored as JSON: {error}; use finite numbers, "
            "strings, lists and dicts with string keys."
        ) from None
    return payload, sealed


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest with `manifest_sha256` over the canonical JSON of all other fields."""
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return body | {"manifest_sha256": hashlib.sha256(canonical_json(body)).hexdigest()}


def parse_manifest(data: bytes) -> dict[str, Any]:
    """Decodes and verifies stored manifest bytes; raises only `ScorerRejected`.

    The bytes must be the canonical spelling, so that every changed bit is noticed, also one that
    leaves the decoded values alone.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ScorerRejected(
            f"The manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read.",
            reason="manifest_size",
        )
    try:
        manifest = json.loads(data)
        canonical = canonical_json(manifest)
    except (ValueError, RecursionError) as error:
        raise ScorerRejected(f"The manifest is not JSON: {error}", reason="manifest") from None
    if not isinstance(manifest, dict) or canonical != data:
        raise ScorerRejected(
            "The manifest is not a JSON object in canonical form.", reason="manifest"
        )
    _check_seal(manifest)
    return manifest


def golden_windows(vocab_size: int, hash_seed: int) -> np.ndarray:
    """Returns the `(8, 32)` int32 self-test windows of a scorer, a function of its hash seed."""
    count = GOLDEN_COUNT * GOLDEN_LENGTH
    positions = np.arange(count, dtype=np.int32)[:, None]
    values = ngram_rows(positions, bits=24, hash_seed=hash_seed)[:, 0]
    return (values % np.uint32(vocab_size)).astype(np.int32).reshape(GOLDEN_COUNT, GOLDEN_LENGTH)


def load(payload: bytes, manifest: Mapping[str, Any]) -> Scorer:
    """Verifies and decodes a scorer.

    Args:
      payload: the safetensors bytes.
      manifest: as returned by `dump` or `parse_manifest`; a `version` field may have been added.

    Returns:
      The scorer. Raises only `ScorerRejected`, whose `reason` is one of: payload_size, manifest,
      manifest_size, manifest_sha256, format, truncated, sha256, header, tensors, non_finite,
      fields, golden, malformed.
    """
    try:
        return _load(payload, manifest)
    except ScorerRejected:
        raise
    # The promise is one exception type for hostile input of any kind; the cause stays attached.
    except Exception as error:
        raise ScorerRejected(
            f"The scorer cannot be decoded: {type(error).__name__}: {error}", reason="malformed"
        ) from error


def _load(payload: bytes, manifest: Mapping[str, Any]) -> Scorer:
    _require(
        len(payload) <= MAX_PAYLOAD_BYTES,
        "payload_size",
        f"the payload has {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} are read",
    )
    _check_seal(manifest)
    _require(
        type(manifest.get("format")) is int and manifest["format"] == FORMAT,
        "format",
        f"its format is {manifest.get('format')!r}, this package reads {FORMAT}; upgrade one side",
    )
    _require(
        set(manifest) - {"version"} == _FIELDS,
        "fields",
        f"its fields differ from the format's: {sorted(set(manifest) ^ _FIELDS)[:8]}",
    )
    _require(
        len(payload) == manifest["payload_bytes"],
        "truncated",
        f"the payload has {len(payload)} bytes, its manifest says {manifest['payload_bytes']}",
    )
    _require(
        hashlib.sha256(payload).hexdigest() == manifest["sha256"],
        "sha256",
        "the payload's SHA-256 differs from the manifest's",
    )
    _check_header(payload, manifest["tensors"])
    tensors = safetensors.numpy.load(payload)
    for name, array in tensors.items():
        _require(bool(np.isfinite(array).all()), "non_finite", f"tensor {name} holds NaN or inf")
    golden = tensors.pop(_GOLDEN)
    strength = manifest["strength"]
    try:
        scorer = Scorer(
            kind=manifest["kind"],
            vocab_size=manifest["vocab_size"],
            bits=manifest["bits"],
            hash_seed=manifest["hash_seed"],
            pad_id=manifest["pad_id"],
            bias=manifest["bias"],
            strength=math.inf if strength == "inf" else strength,
            metadata=manifest["metadata"],
            **tensors,
        )
    except (MetagradFilterError, TypeError) as error:
        raise ScorerRejected(f"The scorer's fields are invalid: {error}", reason="fields") from None
    _require(
        scorer.embedding_bits == manifest["embedding_bits"],
        "fields",
        f"embedding_bits is {manifest['embedding_bits']!r}, the tensor has {scorer.embedding_bits}",
    )
    _check_golden(scorer, golden, manifest["golden"])
    return scorer


def _require(condition: bool, reason: str, seen: str) -> None:
    if not condition:
        raise ScorerRejected(f"The scorer was rejected: {seen}.", reason=reason)


def _check_seal(manifest: Mapping[str, Any]) -> None:
    _require(isinstance(manifest, Mapping), "manifest", "its manifest is not a JSON object")
    _require(
        seal(manifest)["manifest_sha256"] == manifest.get("manifest_sha256"),
        "manifest_sha256",
        "the manifest's SHA-256 differs from the one it carries",
    )


def _check_header(payload: bytes, tensors: Mapping[str, Any]) -> None:
    _require(len(payload) >= 8, "header", "the payload is shorter than a header")
    length = int.from_bytes(payload[:8], "little")
    _require(
        length <= min(MAX_HEADER_BYTES, len(payload) - 8),
        "header",
        f"the header claims {length} bytes",
    )
    header = json.loads(payload[8 : 8 + length])
    allowed = {field.name for field in dataclasses.fields(Scorer)} | {_GOLDEN}
    _require(
        isinstance(header, dict) and set(header) == set(tensors) and set(tensors) <= allowed,
        "tensors",
        "the payload's tensor names differ from the manifest's",
    )
    for name, (dtype, shape) in tensors.items():
        entry = header[name]
        _require(
            dtype == ("int32" if name == _GOLDEN else "float32")
            and entry["dtype"] == _SAFETENSORS_DTYPES[dtype]
            and entry["shape"] == shape,
            "tensors",
            f"tensor {name} is {entry['dtype']}{entry['shape']}, expected {dtype}{shape}",
        )


def _check_golden(scorer: Scorer, windows: np.ndarray, expected: Any) -> None:
    _require(
        windows.shape == (GOLDEN_COUNT, GOLDEN_LENGTH)
        and isinstance(expected, list)
        and len(expected) == GOLDEN_COUNT,
        "golden",
        "the golden windows or their scores have another shape",
    )
    error = float(np.max(np.abs(scorer.score(windows).astype(np.float64) - np.array(expected))))
    scale = max(1.0, float(np.max(np.abs(expected))))
    _require(
        error <= GOLDEN_TOLERANCE * scale,
        "golden",
        f"its golden scores differ by {error:.3g} on this machine, allowed {GOLDEN_TOLERANCE:g}",
    )
