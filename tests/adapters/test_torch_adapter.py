"""torch datasets behind their loaders: exact counts, exact resume, typed errors."""

from __future__ import annotations

import hashlib
import json
import pickle
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, StateMismatch, WindowError

torch: Any = pytest.importorskip("torch")
torchdata: Any = pytest.importorskip("torchdata.stateful_dataloader")
data: Any = torch.utils.data

OPTIONS: dict[str, Any] = {
    "keep_ratio": 0.3,
    "windows": mgf.TextWindows("tokens"),
    "block_windows": 10,
    "swap_every_blocks": 2,
}


class Elements(data.Dataset):
    def __init__(self, n, tensors=False):
        self.n, self.tensors = n, tensors
        self.elements = make_elements(n)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        element = self.elements[i]
        if self.tensors:
            return {"tokens": torch.from_numpy(element["tokens"]), "index": torch.tensor(i)}
        return element


class Shards(data.IterableDataset):
    """Every worker gets each `num_workers`-th element; without a state of its own."""

    def __init__(self, elements):
        self.elements = elements

    def __iter__(self):
        info = data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        yield from self.elements[start::step]


class StatefulShards(Shards):
    """The same with a stateful iterator."""

    def __iter__(self):
        info = data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        return Cursor(self.elements[start::step])


class Cursor:
    def __init__(self, elements):
        self.elements, self.position = elements, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == len(self.elements):
            raise StopIteration
        self.position += 1
        return self.elements[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def score_filter(dataset, run_dir, **options):
    return mgf.adapters.torch.score_filter(dataset, run_dir, **OPTIONS | options)


def flat(batches) -> list[int]:
    return [int(i) for batch in batches for i in np.atleast_1d(batch["index"])]


# One stream with grain.


def digest(elements) -> str:
    sha = hashlib.sha256()
    for element in elements:
        sha.update(np.ascontiguousarray(element["tokens"]).tobytes())
        sha.update(int(element["index"]).to_bytes(8, "little"))
    return sha.hexdigest()


@pytest.mark.parametrize("scored", [False, True])
def test_the_streams_are_those_of_grains_filter(tmp_path, scored):
    if scored:
        publish(tmp_path)
    elements = make_elements(95)
    source = grain.MapDataset.source(elements)
    by_index = mgf.score_filter(source, tmp_path, **OPTIONS)
    by_iterator = mgf.score_filter(source.to_iter_dataset(), tmp_path, name="iterator", **OPTIONS)
    kept = score_filter(Elements(95), tmp_path)
    assert isinstance(kept, data.Dataset) and not isinstance(kept, data.IterableDataset)
    assert len(kept) == len(by_index)
    assert digest(kept[i] for i in range(len(kept))) == digest(by_index)
    stream = score_filter(Shards(elements), tmp_path, name="iterator")
    assert isinstance(stream, data.IterableDataset)
    assert digest(stream) == digest(by_iterator)


# Workers.


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (1, "fork"), (2, "spawn"), (4, "fork")]
)
def test_map_style_batches_do_not_depend_on_the_workers(tmp_path, workers, context):
    publish(tmp_path)
    kept = score_filter(Elements(95, tensors=True), tmp_path)
    expected = [int(kept[i]["index"]) for i in range(len(kept))]
    loader = data.DataLoader(
        kept, batch_size=4, num_workers=workers, multiprocessing_context=context
    )
    batches = list(loader)
    assert flat(batches) == expected
    assert batches[0]["tokens"].shape == (4, 16) and len(batches) == len(loader) == 7
    sampled = flat(data.DataLoader(kept, batch_size=4, shuffle=True, num_workers=workers))
    assert sorted(sampled) == expected


def test_distributed_samplers_share_out_the_kept_windows(tmp_path):
    kept = score_filter(Elements(95), tmp_path)
    ranks = [
        flat(
            data.DataLoader(
                kept, sampler=data.DistributedSampler(kept, 2, rank, shuffle=False), batch_size=2
            )
        )
        for rank in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == [kept[i]["index"] for i in range(len(kept))]
    assert len(ranks[0]) == len(ranks[1]) == 14


@pytest.mark.parametrize("persistent", [False, True])
def test_set_epoch_reaches_workers_and_counts_blocks_on(tmp_path, persistent):
    kept = score_filter(Elements(40), tmp_path, seed=3)
    loader = data.DataLoader(
        kept, batch_size=4, num_workers=2, persistent_workers=persistent, prefetch_factor=1
    )
    epochs = []
    for epoch in (0, 1, 0):
        kept.set_epoch(epoch)
        epochs.append(flat(loader))
    assert epochs[0] == epochs[2] != epochs[1] and len(epochs[1]) == 12
    assert sorted(mgf.Ledger(tmp_path).entries()) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="epoch is -1"):
        kept.set_epoch(-1)


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (1, "fork"), (2, "spawn"), (4, "fork")]
)
def test_each_worker_filters_its_own_shard(tmp_path, workers, context):
    publish(tmp_path)
    elements = make_elements(200)
    kept = score_filter(Shards(elements), tmp_path)
    loader = data.DataLoader(
        kept, batch_size=None, num_workers=workers, multiprocessing_context=context
    )
    indices = [int(e["index"]) for e in loader]
    n = max(workers, 1)
    for worker in range(n):
        shard = elements[worker::n]
        mine = [i for i in indices if i % n == worker]
        alone = mgf.score_filter(
            grain.MapDataset.source(shard).to_iter_dataset(), tmp_path, **OPTIONS
        )
        assert mine == [e["index"] for e in alone]
        assert len(mine) == 3 * len(shard) // 10


def test_a_worker_without_a_shard_is_quiet_and_an_empty_dataset_is_not(tmp_path):
    kept = score_filter(Shards(make_elements(1)), tmp_path, keep_ratio=1)
    assert len(list(data.DataLoader(kept, batch_size=None, num_workers=2))) == 1
    with pytest.raises(WindowError, match="before its first element"):
        list(data.DataLoader(score_filter(Shards([]), tmp_path, keep_ratio=1), batch_size=None))


# Checkpoints.


@pytest.mark.parametrize("rule", ["block", "threshold"])
@pytest.mark.parametrize("source", [Shards, StatefulShards])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_at_every_step(tmp_path, workers, source, rule):
    for interval in (1, 3):
        mgf.Ledger(tmp_path).decide(interval, 0)
    publish(tmp_path)
    elements = make_elements(61)

    def make():
        kept = score_filter(source(elements), tmp_path, annotate=True, rule=rule)
        return torchdata.StatefulDataLoader(kept, batch_size=4, num_workers=workers)

    loader = make()
    states, batches = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert {int(v) for b in batches for v in b["scorer_version"]} == {0, 1}
    for step, state in enumerate(states[:-1], 1):
        resumed = make()
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        rest = list(resumed)
        assert flat(rest) == flat(batches[step:]), step
        for batch, expected in zip(rest, batches[step:]):
            np.testing.assert_equal(batch["score"].numpy(), expected["score"].numpy())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_a_map_style_dataset(tmp_path, workers):
    publish(tmp_path)

    def make():
        kept = score_filter(Elements(61), tmp_path)
        return torchdata.StatefulDataLoader(kept, batch_size=4, num_workers=workers)

    loader = make()
    states, batches = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    for step, state in enumerate(states[:-1], 1):
        resumed = make()
        resumed.load_state_dict(state)
        assert flat(resumed) == flat(batches[step:])


def test_a_state_without_workers_is_json(tmp_path):
    kept = score_filter(Shards(make_elements(61)), tmp_path)
    loader = torchdata.StatefulDataLoader(kept, batch_size=4)
    iterator = iter(loader)
    next(iterator)
    rest = flat(iterator)
    loader = torchdata.StatefulDataLoader(kept, batch_size=4)
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = torchdata.StatefulDataLoader(kept, batch_size=4)
    resumed.load_state_dict(state)
    assert flat(resumed) == rest


def test_the_state_of_another_filter_is_refused(tmp_path):
    elements = make_elements(61)
    loader = torchdata.StatefulDataLoader(score_filter(Shards(elements), tmp_path), batch_size=4)
    next(iter(loader))
    other = score_filter(Shards(elements), tmp_path, name="other", keep_ratio=0.5)
    resumed = torchdata.StatefulDataLoader(other, batch_size=4)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(StateMismatch, match="keep_ratio='3/10'"):
        next(iter(resumed))


# Bad input.

BAD = [
    ({"tokens": np.array([1, VOCAB] * 8, np.int32), "index": 3}, "id 100"),
    ({"tokens": np.zeros(15, np.int32), "index": 3}, "equal lengths"),
    ({"tokens": np.zeros(0, np.int32), "index": 3}, "empty"),
    ({"tokens": torch.zeros(16), "index": 3}, "integer"),
    ({"text": "x", "index": 3}, "available"),
]


@pytest.mark.parametrize("style", ["map", "iterable"])
@pytest.mark.parametrize(("bad", "message", "workers"), [(*b, 0) for b in BAD] + [(*BAD[0], 1)])
def test_unreadable_windows_end_typed(tmp_path, bad, message, style, workers):
    publish(tmp_path)
    dataset = Elements(12)
    dataset.elements[3] = bad
    kept = score_filter(dataset if style == "map" else Shards(dataset.elements), tmp_path)
    with pytest.raises(WindowError, match=message):
        list(data.DataLoader(kept, batch_size=None, num_workers=workers))


def test_other_objects_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="filter the dataset, not its loader"):
        score_filter(iter([1]), tmp_path)
    with pytest.raises(ConfigError, match="order of arrival"):
        score_filter(Elements(3), tmp_path, rule="threshold")
    with pytest.raises(WindowError, match="length 0"):
        score_filter(Elements(0), tmp_path)
