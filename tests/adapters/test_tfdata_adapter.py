"""tf.data: the same element spec and counts, the error's sentence, and a state that resumes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer, make_windows

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, StateMismatch, WindowError

tf: Any = pytest.importorskip("tensorflow")

OPTIONS: dict[str, Any] = {
    "keep_ratio": 0.3,
    "windows": mgf.TextWindows("tokens"),
    "block_windows": 10,
    "swap_every_blocks": 2,
}


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def source(n):
    return tf.data.Dataset.from_tensor_slices(
        {"tokens": make_windows(n), "index": np.arange(n), "text": [f"row {i}" for i in range(n)]}
    )


def score_filter(dataset, run_dir, **options):
    return mgf.adapters.tfdata.score_filter(dataset, run_dir, **OPTIONS | options)


def stream(dataset, run_dir, **options):
    return mgf.adapters.tfdata.stream(dataset, run_dir, **OPTIONS | options)


def indices(elements) -> list[int]:
    return [int(e["index"]) for e in elements]


def digest(elements) -> str:
    sha = hashlib.sha256()
    for element in elements:
        sha.update(np.ascontiguousarray(element["tokens"]).tobytes())
        sha.update(int(element["index"]).to_bytes(8, "little"))
    return sha.hexdigest()


@pytest.mark.parametrize("scored", [False, True])
def test_the_stream_is_that_of_grains_filter(tmp_path, scored):
    if scored:
        publish(tmp_path)
    ds = grain.MapDataset.source(make_elements(95)).to_iter_dataset()
    expected = digest(mgf.score_filter(ds, tmp_path, **OPTIONS))
    kept = score_filter(source(95), tmp_path)
    assert isinstance(kept, tf.data.Dataset)
    assert digest(kept.as_numpy_iterator()) == digest(kept.as_numpy_iterator()) == expected
    assert digest(stream(source(95), tmp_path)) == expected
    assert digest(kept.prefetch(4).batch(1).unbatch().as_numpy_iterator()) == expected


def test_spec_cardinality_and_stages_after_are_kept(tmp_path):
    publish(tmp_path)
    kept = score_filter(source(95), tmp_path)
    assert kept.element_spec == source(95).element_spec and int(kept.cardinality()) == 28
    first = next(iter(kept))
    assert first["text"].numpy() == f"row {int(first['index'])}".encode()
    assert [len(b["index"]) for b in kept.batch(10)] == [10, 10, 8]
    unknown = source(95).filter(lambda e: e["index"] >= 5)
    assert len(list(score_filter(unknown, tmp_path))) == 27


def test_annotations_join_the_spec(tmp_path):
    publish(tmp_path)
    kept = score_filter(source(40), tmp_path, annotate=True)
    scores = make_scorer(1).score(make_windows(40))
    for element in kept:
        assert element["score"] == scores[int(element["index"])]
        assert element["scorer_version"] == 1
    arrays = tf.data.Dataset.from_tensor_slices(make_windows(20))
    with pytest.raises(ConfigError, match="dict elements"):
        score_filter(arrays, tmp_path, windows=mgf.TextWindows(), annotate=True)
    plain = score_filter(arrays, tmp_path, windows=mgf.TextWindows(), name="arrays")
    assert len(list(plain)) == 6


@pytest.mark.parametrize("rule", ["block", "threshold"])
def test_the_stream_resumes_at_every_step(tmp_path, rule):
    for interval in (1, 3):
        mgf.Ledger(tmp_path).decide(interval, 0)
    publish(tmp_path)

    def make():
        shuffled = source(73).shuffle(30, seed=2, reshuffle_each_iteration=False)
        return stream(shuffled, tmp_path, rule=rule, annotate=True)

    kept = make()
    states, expected = [kept.state_dict()], []
    for element in kept:
        expected.append(element)
        states.append(kept.state_dict())
    assert indices(expected) != sorted(indices(expected))
    for step, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        np.testing.assert_equal(list(resumed), expected[step:], err_msg=str(step))
    other = stream(source(73), tmp_path, name="other", seed=1)
    if rule == "block":
        with pytest.raises(StateMismatch, match="name='default'"):
            other.load_state_dict(states[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([1, VOCAB] * 8, np.int32), "id 100"),
        (np.zeros(15, np.int32), "equal lengths"),
        (np.zeros(0, np.int32), "empty"),
    ],
)
def test_unreadable_windows_end_with_their_reason(tmp_path, bad, message):
    publish(tmp_path)
    arrays = list(make_windows(12))
    arrays[3] = bad
    spec = {"tokens": tf.TensorSpec((None,), tf.int32)}
    ds = tf.data.Dataset.from_generator(
        lambda: ({"tokens": a} for a in arrays), output_signature=spec
    )
    with pytest.raises(WindowError, match=message):
        list(stream(ds, tmp_path))
    with pytest.raises(tf.errors.OpError, match=f"WindowError: .*{message}"):
        list(score_filter(ds, tmp_path))


def test_wrong_dtypes_keys_and_datasets_say_what_to_do(tmp_path):
    publish(tmp_path)
    floats = tf.data.Dataset.from_tensor_slices({"tokens": np.zeros((12, 16), np.float32)})
    with pytest.raises(WindowError, match="integer"):
        list(stream(floats, tmp_path))
    with pytest.raises(tf.errors.OpError, match="no key 'words', available"):
        list(score_filter(source(20), tmp_path, windows=mgf.TextWindows("words"), name="words"))
    with pytest.raises(ConfigError, match=r"tf\.data\.Dataset"):
        score_filter([1, 2], tmp_path)
    with pytest.raises(ConfigError, match=r"adapters\.stream"):
        stream(iter([1]), tmp_path)
    with pytest.raises(WindowError, match="before its first element"):
        list(stream(source(20).take(0), tmp_path))
