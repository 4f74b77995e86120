"""The filter in a loader laid out as torchtitan lays out its own, saved with torch's checkpoints.

torchtitan itself is not installed. What is imitated is its interface: a dataset is a config object
with `build(context, policy)` that returns a grain dataset, a loader batches what it built, and the
trainer saves the loader's `state_dict` through `torch.distributed.checkpoint`, which needs the same
keys at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import make_elements, make_scorer

import metagrad_filter as mgf

torch: Any = pytest.importorskip("torch")
torchdata: Any = pytest.importorskip("torchdata.stateful_dataloader")
import torch.distributed.checkpoint as dcp  # noqa: E402  # pyright: ignore


@dataclass(frozen=True)
class Context:
    """What a build is told: which part of the data this rank reads."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Policy:
    """How a build iterates."""

    repeat: bool = False


@dataclass(frozen=True, kw_only=True)
class Books:
    """A user's dataset."""

    windows: int

    def build(self, context: Context, policy: Policy) -> grain.IterDataset:
        ds = grain.MapDataset.source(make_elements(self.windows))
        ds = ds[context.rank :: context.world_size].shuffle(seed=0)
        return (ds.repeat() if policy.repeat else ds).to_iter_dataset()


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """The line: any dataset config, filtered. It repeats below the filter, never above it."""

    dataset: Books
    run_dir: str
    keep_ratio: float

    def build(self, context: Context, policy: Policy) -> grain.IterDataset:
        return mgf.score_filter(
            self.dataset.build(context, policy),
            self.run_dir,
            keep_ratio=self.keep_ratio,
            windows=mgf.TextWindows("tokens"),
            block_windows=10,
            swap_every_blocks=2,
        )


class Loader:
    """Batches what a config built; keeps grain's state under one constant key."""

    def __init__(self, dataset: Filtered, context: Context, policy: Policy, batch_size: int):
        ds = dataset.build(context, policy).batch(batch_size, drop_remainder=True)
        self._iterator = iter(ds)
        self._key = f"rank_{context.rank}"

    def __iter__(self):
        return self._iterator

    def state_dict(self):
        return {self._key: self._iterator.get_state()}

    def load_state_dict(self, state_dict):
        self._iterator.set_state(state_dict[self._key])


def leaves(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), type(value)


def save(state, directory):
    dcp.save({"loader": state}, checkpoint_id=str(directory), no_dist=True)


def load(state, directory):
    into = {"loader": state}
    dcp.load(into, checkpoint_id=str(directory), no_dist=True)
    return into["loader"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trainer_resumes_through_torch_checkpoints(tmp_path):
    run_dir = str(tmp_path / "run")
    mgf.Ledger(run_dir).decide(0, 0)
    mgf.Registry(run_dir).publish(make_scorer(1))

    def make(rank=0):
        config = Filtered(dataset=Books(windows=90), run_dir=run_dir, keep_ratio=0.3)
        return Loader(config, Context(rank, 2), Policy(repeat=True), batch_size=2)

    for rank in range(2):
        loader = make(rank)
        batches, shapes = [], set()
        for step in range(12):
            save(loader.state_dict(), tmp_path / f"{rank}-{step}")
            shapes.add(tuple(leaves(loader.state_dict())))
            batches.append(next(iter(loader)))
        assert len(shapes) == 1
        # Into the second epoch, and past the interval that was decided uniformly.
        assert set(mgf.Ledger(run_dir).entries()) >= {0, 1, 2, 3}
        for step in range(12):
            resumed = make(rank)
            resumed.load_state_dict(load(resumed.state_dict(), tmp_path / f"{rank}-{step}"))
            rest = [next(iter(resumed)) for _ in range(12 - step)]
            np.testing.assert_equal(rest, batches[step:])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stateful_loader_resumes_through_torch_checkpoints(tmp_path):
    mgf.Registry(tmp_path / "run").publish(make_scorer(1))

    class Windows(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from make_elements(90)

    def make():
        kept = mgf.adapters.torch.score_filter(
            Windows(),
            tmp_path / "run",
            keep_ratio=0.3,
            windows=mgf.TextWindows("tokens"),
            block_windows=10,
        )
        return torchdata.StatefulDataLoader(kept, batch_size=4)

    loader = make()
    batches = []
    for step, batch in enumerate(loader):
        batches.append(batch["index"].tolist())
        save(loader.state_dict(), tmp_path / str(step))
    for step in range(len(batches) - 1):
        resumed = make()
        resumed.load_state_dict(load(resumed.state_dict(), tmp_path / str(step)))
        assert [b["index"].tolist() for b in resumed] == batches[step + 1 :]
