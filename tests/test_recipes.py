"""The filter in a pipeline laid out as MaxText lays out its own, with its JSON checkpoints.

MaxText itself is not installed. What is imitated is its input pipeline's order (source, tokenize,
shuffle, pack, *filter*, batch, `mp_prefetch`) and its checkpoint, one JSON file a process with the
iterator's state. In MaxText the line goes into `format_and_batch`, before `dataset.batch`.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_scorer

import metagrad_filter as mgf

LENGTH = 16


class Tokenize(grain.transforms.Map):
    """A document's text to ids; stands for the tokenizer."""

    def map(self, element):
        ids = np.frombuffer(element["text"].encode(), np.uint8).astype(np.int32) % VOCAB
        return {"inputs": ids}


def documents(n):
    rng = np.random.default_rng(0)
    return [
        {"text": "".join(map(chr, rng.integers(32, 127, rng.integers(3, LENGTH))))}
        for _ in range(n)
    ]


def packed(source, *, process=0, processes=1, seed=0):
    ds = grain.MapDataset.source(source)[process::processes]
    ds = ds.map(Tokenize()).shuffle(seed=seed).to_iter_dataset()
    # First-fit. The other packing that MaxText offers, concat-then-split, loses data by itself when
    # grain 0.2.18 restores it from JSON, with or without a filter.
    return grain.experimental.FirstFitPackIterDataset(
        ds, length_struct={"inputs": LENGTH}, num_packing_bins=4
    )


def pipeline(source, run_dir, *, workers=0, batch=2, **options):
    ds = packed(source, **options)
    # Packed elements are dicts with ids in "inputs" and zeros where nothing was packed.
    ds = mgf.score_filter(
        ds,
        run_dir,
        keep_ratio=0.5,
        windows=mgf.TextWindows("inputs", pad_id=0),
        block_windows=8,
        swap_every_blocks=2,
    )
    ds = ds.batch(batch, drop_remainder=True)
    return ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def save(directory, iterators):
    """As MaxText's handler does: a file a process, named by its number and their count."""
    for process, iterator in enumerate(iterators):
        path = directory / f"process_{process}-of-{len(iterators)}.json"
        path.write_text(json.dumps(iterator.get_state(), indent=4))


def restore(directory, iterators):
    for process, iterator in enumerate(iterators):
        path = directory / f"process_{process}-of-{len(iterators)}.json"
        iterator.set_state(json.loads(path.read_text()))


def assert_same(got: list[Any], expected: list[Any]):
    np.testing.assert_equal(got, expected)
    assert got, "nothing was compared"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_packed_pipeline_resumes_from_its_json_files(tmp_path, workers):
    mgf.Ledger(tmp_path / "run").decide(0, 0)
    mgf.Registry(tmp_path / "run").publish(make_scorer(1))
    source = documents(300)

    def make():
        return [
            iter(pipeline(source, tmp_path / "run", workers=workers, process=p, processes=2))
            for p in range(2)
        ]

    hosts = make()
    states = []
    batches: list[list[Any]] = [[], []]
    # Both hosts step together; the shorter ends the epoch for both.
    for step, pair in enumerate(zip(*hosts)):
        for host in range(2):
            batches[host].append(pair[host])
        if step % (1 if workers == 0 else 8) == 0:
            directory = tmp_path / f"checkpoint-{step}"
            directory.mkdir()
            save(directory, hosts)
            states.append((step, directory))
    assert batches[0][0]["inputs"].shape == (2, LENGTH) and len(states) > 2
    assert set(mgf.Ledger(tmp_path / "run").entries()) >= {0, 1}
    for step, directory in states[:-1]:
        resumed = make()
        restore(directory, resumed)
        rest = len(batches[0]) - step - 1
        for host in range(2):
            got = list(itertools.islice(resumed[host], rest))
            assert_same(got, batches[host][step + 1 :])


def test_the_line_keeps_half_of_the_packed_windows(tmp_path):
    run_dir = tmp_path / "run"
    mgf.Registry(run_dir).publish(make_scorer(1))
    source = documents(300)
    windows = np.stack([element["inputs"] for element in packed(source)])
    kept = np.concatenate([batch["inputs"] for batch in pipeline(source, run_dir, batch=1)])
    assert len(kept) == len(windows) // 2
    scores = make_scorer(1).score(windows, pad_id=0)
    expected = [
        window
        for start in range(0, len(windows) // 8 * 8, 8)
        for window in windows[start + np.sort(np.argsort(-scores[start : start + 8])[:4])]
    ]
    np.testing.assert_array_equal(kept[: len(expected)], expected)
