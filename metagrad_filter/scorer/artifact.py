"""A scorer as bytes: safetensors payload + JSON manifest, verified before anything uses it.

    dump(scorer)            -> payload bytes, manifest dict
    load(payload, manifest) -> a scorer, or ScorerRejected with a one-word reason

Scorers of every kind go through here; `StoredScorer` is all that this file knows about one. The
manifest names every tensor with dtype and shape, the payload's SHA-256, and the scores of eight
golden windows; it ends with a SHA-256 over itself. `load` checks in the order in which a check is
cheap and safe: sizes, hashes, header, tensors, finiteness, fields, golden scores. Nothing in it can
run, and whatever bytes come in, the only exception is `ScorerRejected`.

Read next: `registry.py` (where the two files live).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import safetensors.numpy

from metagrad_filter.errors import ConfigError, MetagradFilterError, ScorerRejected
from metagrad_filter.files import canonical_json
from metagrad_filter.scorer.scorer import Scorer

FORMAT = 2
MAX_PAYLOAD_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 2**20
MAX_HEADER_BYTES = 64 * 2**10
GOLDEN_COUNT = 8
GOLDEN_TOLERANCE = 1e-5

_FIELDS = {
    "format", "kind", "fields", "strength", "tensors", "payload_bytes", "sha256", "golden",
    "metadata", "manifest_sha256",
}  # fmt: skip
_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "int8": ("I8", 1)}


class StoredScorer(Protocol):
    """What a scorer of any kind offers to be stored and rebuilt.

    Attributes:
      kind: names the class in manifests.
      strength: how strongly the filter may act, in [0, inf].
      metadata: JSON types.
    """

    kind: ClassVar[str]

    @property
    def strength(self) -> float: ...

    @property
    def metadata(self) -> dict[str, Any]: ...

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the arrays that make the score; float32, float16 or int8."""
        ...

    def fields(self) -> dict[str, Any]:
        """Returns the scalars that make the score; JSON types."""
        ...

    @classmethod
    def from_parts(
        cls,
        fields: dict[str, Any],
        tensors: dict[str, np.ndarray],
        *,
        strength: float,
        metadata: dict[str, Any],
    ) -> StoredScorer:
        """Rebuilds a scorer; raises `ConfigError` on any name, type, shape or dtype that is odd."""
        ...

    def golden_windows(self) -> np.ndarray:
        """Returns eight self-test windows, a pure function of the fields."""
        ...

    def score(self, windows: np.ndarray) -> np.ndarray:
        """Scores `(N, ...)` windows as `(N,)` float32."""
        ...


def class_of(kind: Any) -> type[StoredScorer] | None:
    """Returns the class of scorers of a kind, or None for an unknown kind."""
    if kind == "text":
        return Scorer
    if kind == "series":
        # A loader of text has no use for it.
        from metagrad_filter.scorer.series import SeriesScorer

        return SeriesScorer
    return None


def dump(scorer: StoredScorer) -> tuple[bytes, dict[str, Any]]:
    """Encodes a scorer.

    Args:
      scorer: any valid scorer whose tensors fit 64 MiB.

    Returns:
      The safetensors payload and the manifest (JSON types only). Raises `ConfigError` when the
      payload is too large, the golden scores are not finite or the metadata is not JSON.
    """
    tensors = scorer.tensors()
    size = sum(tensor.nbytes for tensor in tensors.values()) + MAX_HEADER_BYTES
    if size > MAX_PAYLOAD_BYTES:
        raise ConfigError(
            f"The scorer takes {size} bytes, at most {MAX_PAYLOAD_BYTES} can be published; "
            "quantise it to int8, or fit a smaller preset."
        )
    payload = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    golden = [float(s) for s in scorer.score(scorer.golden_windows())]
    if not all(map(math.isfinite, golden)):
        raise ConfigError(
            f"The scorer scores its golden windows as {golden}, expected finite scores; fit again "
            "with labels of a smaller range."
        )
    manifest = {
        "format": FORMAT,
        "kind": scorer.kind,
        "fields": scorer.fields(),
        "strength": "inf" if math.isinf(scorer.strength) else float(scorer.strength),
        "tensors": {k: [str(v.dtype), list(v.shape)] for k, v in tensors.items()},
        "payload_bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
        "golden": golden,
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


def load(payload: bytes, manifest: Mapping[str, Any]) -> Any:
    """Verifies and decodes a scorer.

    Args:
      payload: the safetensors bytes.
      manifest: as returned by `dump` or `parse_manifest`; a `version` field may have been added.

    Returns:
      The scorer, of the class of its kind. Raises only `ScorerRejected`, whose `reason` is one of:
      payload_size, manifest, manifest_size, manifest_sha256, format, truncated, sha256, header,
      tensors, non_finite, fields, golden, malformed.
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


def _load(payload: bytes, manifest: Mapping[str, Any]) -> StoredScorer:
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
    kind, fields, strength = manifest["kind"], manifest["fields"], manifest["strength"]
    found = class_of(kind)
    _require(found is not None, "fields", f"its kind is {str(kind)[:40]!r}, a kind unknown here")
    _require(isinstance(fields, dict), "fields", "its fields are not a JSON object")
    assert found is not None
    _check_header(payload, manifest["tensors"])
    tensors = safetensors.numpy.load(payload)
    for name, array in tensors.items():
        _require(bool(np.isfinite(array).all()), "non_finite", f"tensor {name} holds NaN or inf")
    try:
        scorer = found.from_parts(
            fields,
            tensors,
            strength=math.inf if strength == "inf" else strength,
            metadata=manifest["metadata"],
        )
    except (MetagradFilterError, TypeError) as error:
        raise ScorerRejected(f"The scorer's parts are invalid: {error}", reason="fields") from None
    _check_golden(scorer, manifest["golden"])
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
    """Compares the payload's own table of contents with the manifest's, before it is decoded."""
    _require(len(payload) >= 8, "header", "the payload is shorter than a header")
    length = int.from_bytes(payload[:8], "little")
    _require(
        length <= min(MAX_HEADER_BYTES, len(payload) - 8),
        "header",
        f"the header claims {length} bytes",
    )
    header = json.loads(payload[8 : 8 + length], object_pairs_hook=_without_duplicates)
    _require(
        isinstance(header, dict) and header.keys() == tensors.keys(),
        "tensors",
        "the payload's tensor names differ from the manifest's",
    )
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = tensors[name]
        code, itemsize = _DTYPES.get(dtype, ("", 0))
        begin, following = entry["data_offsets"]
        _require(
            entry["dtype"] == code
            and entry["shape"] == shape
            and all(type(size) is int and 0 <= size <= MAX_PAYLOAD_BYTES for size in shape)
            and (begin, following - begin) == (end, math.prod(shape) * itemsize),
            "tensors",
            f"tensor {name[:40]} is {str(entry)[:100]}, expected {str(dtype)[:20]}"
            f"{str(shape)[:40]} at byte {end}",
        )
        end = following
    _require(end == len(payload) - 8 - length, "tensors", "the tensors do not fill the payload")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    _require(len(found) == len(pairs), "tensors", "the header repeats a name")
    return found


def _check_golden(scorer: StoredScorer, expected: Any) -> None:
    _require(
        isinstance(expected, list) and len(expected) == GOLDEN_COUNT,
        "golden",
        "the scores of the golden windows are not a list of eight",
    )
    scores = scorer.score(scorer.golden_windows()).astype(np.float64)
    error = float(np.max(np.abs(scores - np.array(expected, np.float64))))
    scale = max(1.0, float(np.max(np.abs(expected))))
    _require(
        error <= GOLDEN_TOLERANCE * scale,
        "golden",
        f"its golden scores differ by {error:.3g} on this machine, allowed {GOLDEN_TOLERANCE:g}",
    )
