"""Hugging Face datasets: their own methods, states and workers go on working, counts are exact."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, StateMismatch, WindowError

datasets: Any = pytest.importorskip("datasets")
torch: Any = pytest.importorskip("torch")
torchdata: Any = pytest.importorskip("torchdata.stateful_dataloader")
from datasets.distributed import split_dataset_by_node  # noqa: E402  # pyright: ignore

OPTIONS: dict[str, Any] = {
    "keep_ratio": 0.3,
    "windows": mgf.TextWindows("tokens"),
    "block_windows": 10,
    "swap_every_blocks": 2,
}
FEATURES = datasets.Features(
    {"tokens": datasets.List(datasets.Value("int32")), "index": datasets.Value("int64")}
)


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def table(n):
    columns = {"tokens": [], "index": []}
    for element in make_elements(n):
        columns["tokens"].append(element["tokens"].tolist())
        columns["index"].append(element["index"])
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def streamed(n, shards=1, *, source="table"):
    if source == "table":
        return table(n).to_iterable_dataset(num_shards=shards)

    def generate(starts):
        for start in starts:
            for element in make_elements(n)[start::shards]:
                yield {"tokens": element["tokens"].tolist(), "index": element["index"]}

    return datasets.IterableDataset.from_generator(
        generate, gen_kwargs={"starts": list(range(shards))}
    )


def score_filter(dataset, run_dir, **options):
    return mgf.adapters.huggingface.score_filter(dataset, run_dir, **OPTIONS | options)


def indices(elements) -> list[int]:
    return [int(e["index"]) for e in elements]


def through_grain(elements, run_dir, **options):
    ds = grain.MapDataset.source(elements).to_iter_dataset()
    return list(mgf.score_filter(ds, run_dir, **OPTIONS | options))


def digest(elements) -> str:
    sha = hashlib.sha256()
    for element in elements:
        sha.update(np.asarray(element["tokens"], np.int32).tobytes())
        sha.update(int(element["index"]).to_bytes(8, "little"))
    return sha.hexdigest()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("source", ["table", "generator"])
def test_the_stream_is_that_of_grains_filter(tmp_path, source, scored):
    if scored:
        publish(tmp_path)
    # With blocks of 7 the quota depends on the place of the block.
    kept = score_filter(streamed(95, source=source), tmp_path, block_windows=7)
    assert isinstance(kept, datasets.IterableDataset)
    expected = through_grain(make_elements(95), tmp_path, block_windows=7)
    assert digest(kept) == digest(kept) == digest(expected)


def test_a_dataset_comes_back_as_a_selection(tmp_path):
    publish(tmp_path)
    kept = score_filter(table(95), tmp_path, annotate=True)
    assert isinstance(kept, datasets.Dataset) and len(kept) == 28
    expected = list(
        mgf.score_filter(grain.MapDataset.source(make_elements(95)), tmp_path, **OPTIONS)
    )
    assert digest(kept) == digest(expected)
    scores = make_scorer(1).score(np.stack([e["tokens"] for e in expected]))
    np.testing.assert_array_equal(np.array(kept["score"], np.float32), scores)
    assert set(kept["scorer_version"]) == {1} and len(kept.filter(lambda e: e["index"] > 50)) > 0
    plain = score_filter(table(95), tmp_path)
    assert plain.features == FEATURES and indices(plain) == indices(kept)


# Their methods around the filter.


def test_map_batch_and_with_format_go_on_working(tmp_path):
    publish(tmp_path)
    source = streamed(95, shards=3).map(lambda e: {"length": len(e["tokens"])})
    kept = score_filter(source, tmp_path)
    expected = indices(kept)
    doubled = kept.map(lambda e: {"double": 2 * e["index"]})
    assert [e["double"] for e in doubled] == [2 * i for i in expected]
    assert [i for b in kept.batch(4) for i in b["index"]] == expected
    tensors = list(kept.with_format("torch"))
    assert torch.is_tensor(tensors[0]["tokens"]) and indices(tensors) == expected
    before = score_filter(streamed(95, shards=3).with_format("numpy"), tmp_path)
    assert indices(before) == expected and isinstance(next(iter(before))["tokens"], np.ndarray)
    assert indices(kept.take(5)) == expected[:5]
    assert "length" in next(iter(kept))


def test_features_stay_and_annotations_join_them(tmp_path):
    publish(tmp_path)
    assert score_filter(streamed(30), tmp_path).features == FEATURES
    kept = score_filter(streamed(30), tmp_path, annotate=True)
    assert kept.features["score"] == datasets.Value("float32")
    expected = through_grain(make_elements(30), tmp_path, annotate=True)
    assert indices(kept) == indices(expected)
    for mine, theirs in zip(kept, expected):
        assert np.float32(mine["score"]) == theirs["score"] and mine["scorer_version"] == 1
    untyped = score_filter(streamed(30, source="generator"), tmp_path, annotate=True)
    assert [e["score"] for e in untyped] == [e["score"] for e in kept]


# Checkpoints.


@pytest.mark.parametrize("annotate", [False, True])
@pytest.mark.parametrize(("source", "shards"), [("table", 1), ("table", 3), ("generator", 3)])
def test_their_state_resumes_at_every_step(tmp_path, source, shards, annotate):
    for interval in (1, 3):
        mgf.Ledger(tmp_path).decide(interval, 0)
    publish(tmp_path)

    def make():
        return score_filter(streamed(73, shards, source=source), tmp_path, annotate=annotate)

    kept = make()
    states, expected = [kept.state_dict()], []
    for element in kept:
        expected.append(element)
        states.append(kept.state_dict())
    assert len(expected) == 21
    for step, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert indices(resumed) == indices(expected[step:]), step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_every_step(tmp_path, workers):
    publish(tmp_path)

    def make():
        kept = score_filter(streamed(73, 4), tmp_path).with_format("torch")
        return torchdata.StatefulDataLoader(kept, batch_size=3, num_workers=workers)

    loader = make()
    states, batches = [], []
    for batch in loader:
        batches.append(batch["index"].tolist())
        states.append(loader.state_dict())
    for step, state in enumerate(states[:-1], 1):
        resumed = make()
        resumed.load_state_dict(state)
        assert [b["index"].tolist() for b in resumed] == batches[step:], step


# Workers and nodes.


def test_each_worker_filters_its_own_shards(tmp_path):
    publish(tmp_path)
    elements = make_elements(80)
    loader = torch.utils.data.DataLoader(
        score_filter(streamed(80, 4), tmp_path), batch_size=None, num_workers=2
    )
    got = indices(loader)
    # Shards are consecutive quarters; worker 0 reads shards 0 and 2, worker 1 shards 1 and 3.
    for shards in ((0, 2), (1, 3)):
        mine = [e for s in shards for e in elements[20 * s : 20 * s + 20]]
        expected = indices(through_grain(mine, tmp_path))
        assert [i for i in got if i // 20 in shards] == expected and len(expected) == 12


@pytest.mark.parametrize("order", ["filter then split", "split then filter"])
def test_nodes_filter_their_own_shards_and_keep_equally_many(tmp_path, order):
    publish(tmp_path)
    elements = make_elements(80)
    nodes = []
    for rank in range(2):
        if order == "split then filter":
            split = split_dataset_by_node(streamed(80, 4), rank, 2)
            kept = score_filter(split, tmp_path)
        else:
            kept = split_dataset_by_node(score_filter(streamed(80, 4), tmp_path), rank, 2)
        nodes.append(indices(kept))
    assert len(nodes[0]) == len(nodes[1]) == 12
    for node in nodes:
        shards = sorted({i // 20 for i in node})
        mine = [e for s in shards for e in elements[20 * s : 20 * s + 20]]
        assert node == indices(through_grain(mine, tmp_path))


def test_nodes_without_shards_of_their_own_share_out_what_is_kept(tmp_path):
    publish(tmp_path)
    nodes = [
        indices(split_dataset_by_node(score_filter(streamed(80, 3), tmp_path), rank, 2))
        for rank in range(2)
    ]
    everything = indices(through_grain(make_elements(80), tmp_path))
    assert nodes == [everything[0::2], everything[1::2]]


# Bad input.


@pytest.mark.parametrize("kind", ["table", "stream"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1, VOCAB]] * 12, "id 100"),
        ([[1, 2]] * 3 + [[1]] + [[1, 2]] * 8, "equal lengths"),
        ([[1, 2]] * 3 + [[]] + [[1, 2]] * 8, "empty"),
        ([[0.5, 0.5]] * 12, "integer"),
        ([None] * 12, "shape"),
    ],
)
def test_unreadable_windows_end_typed(tmp_path, column, message, kind):
    publish(tmp_path)
    dataset = datasets.Dataset.from_dict({"tokens": column})
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(WindowError, match=message):
        list(score_filter(dataset, tmp_path))


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_missing_key_names_the_columns(tmp_path, kind):
    publish(tmp_path)
    dataset = table(20) if kind == "table" else streamed(20)
    with pytest.raises(WindowError, match=r"no key 'text', available: \['index', 'tokens'\]"):
        list(score_filter(dataset, tmp_path, windows=mgf.TextWindows("text")))


def test_other_datasets_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="each split"):
        score_filter(datasets.DatasetDict({"train": table(3)}), tmp_path)
    with pytest.raises(ConfigError, match="with_format after"):
        score_filter(streamed(20).with_format("arrow"), tmp_path)
    with pytest.raises(ConfigError, match="order of arrival"):
        score_filter(streamed(20), tmp_path, rule="threshold")
    with pytest.raises(ConfigError, match="order of arrival"):
        score_filter(table(20), tmp_path, rule="threshold")
    with pytest.raises(ConfigError, match=r"adapters\.huggingface"):
        mgf.adapters.torch.score_filter(streamed(20), tmp_path, **OPTIONS)
    with pytest.raises(WindowError, match="length 0"):
        score_filter(table(0), tmp_path)
    score_filter(streamed(20), tmp_path)
    with pytest.raises(StateMismatch, match="block_windows"):
        score_filter(streamed(20), tmp_path, block_windows=5)


def test_random_access_is_lazy_through_the_torch_adapter(tmp_path):
    kept = mgf.adapters.torch.score_filter(table(95), tmp_path, **OPTIONS)
    first = [kept[i]["index"] for i in range(6)]
    publish(tmp_path)
    rest = [kept[i]["index"] for i in range(6, len(kept))]
    versions = [e.version for e in mgf.Ledger(tmp_path).entries().values()]
    assert versions == [0, 1, 1, 1, 1] and len(first + rest) == 28
