"""Which version acts, and that neither a hung nor a failing store stops the loader."""

import threading
from pathlib import Path

import pytest
from hotlane import make_scorer

from metagrad_filter import decisions
from metagrad_filter.counting import counters
from metagrad_filter.decisions import UNIFORM, Decisions
from metagrad_filter.errors import ScorerRejected, StateMismatch
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry
from metagrad_filter.store import LocalStore


class Shim(LocalStore):
    """A directory whose ledger can be made to hang or to fail."""

    hanging = failing = False

    def __init__(self, directory):
        super().__init__(directory)
        self.release = threading.Event()

    def _trouble(self, key):
        if key.startswith("ledger"):
            if self.hanging:
                self.release.wait(30)
            if self.failing:
                raise OSError(5, "Input/output error")

    def read(self, key, limit):
        self._trouble(key)
        return super().read(key, limit)

    def write_once(self, key, data):
        self._trouble(key)
        return super().write_once(key, data)


@pytest.fixture
def store(tmp_path):
    shim = Shim(tmp_path)
    yield shim
    shim.release.set()


def test_the_first_to_arrive_decides_and_all_others_follow(tmp_path):
    assert Decisions(tmp_path, "a").scorer(0) == (UNIFORM, None)
    Registry(tmp_path).publish(make_scorer(1))
    mine = Decisions(tmp_path, "a")
    assert mine.scorer(0) == (UNIFORM, None)
    version, scorer = mine.scorer(1)
    assert version == 1 and scorer.metadata["seed"] == 1
    Registry(tmp_path).publish(make_scorer(2))
    assert Decisions(tmp_path, "a").scorer(1)[0] == 1
    assert Decisions(tmp_path, "a").scorer(2)[0] == 2
    assert Decisions(tmp_path, "b").scorer(1)[0] == 2


def test_many_intervals_keep_a_few_scorers_loaded(tmp_path):
    registry, mine = Registry(tmp_path), Decisions(tmp_path, "a")
    for interval in range(8):
        registry.publish(make_scorer(interval))
        assert mine.scorer(interval)[0] == interval + 1
    assert len(mine._scorers) == 4
    version, scorer = mine.scorer(0)
    assert version == 1 and scorer.metadata["seed"] == 0


def test_a_store_that_hangs_leaves_the_last_version_acting(store, monkeypatch):
    monkeypatch.setattr(decisions, "_PATIENCE", 0.05)
    Registry(store).publish(make_scorer(1))
    mine = Decisions(store, "hang")
    assert mine.scorer(0, strict=True)[0] == 1
    Registry(store).publish(make_scorer(2))
    store.hanging = True
    with pytest.warns(RuntimeWarning, match="no answer within") as caught:
        assert [mine.scorer(interval)[0] for interval in (1, 2, 3)] == [1, 1, 1]
    assert len(caught) == 1 and counters("hang").ledger_unwritable == 3
    assert mine.scorer(1)[0] == 1  # remembered, not asked again
    store.hanging = False
    store.release.set()
    assert mine.scorer(4)[0] == 2


def test_a_store_that_fails_leaves_the_last_version_acting(store):
    Registry(store).publish(make_scorer(1))
    mine = Decisions(store, "fail")
    assert mine.scorer(0, strict=True)[0] == 1
    store.failing = True
    with pytest.warns(RuntimeWarning, match="Input/output error"):
        assert mine.scorer(1)[0] == 1
    assert counters("fail").ledger_unwritable == 1


def test_before_anything_was_decided_a_store_in_trouble_means_uniform(store):
    Registry(store).publish(make_scorer(1))
    store.failing = True
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        assert Decisions(store, "never").scorer(0, strict=True) == (UNIFORM, None)


def test_what_a_checkpoint_asks_for_is_never_replaced(tmp_path):
    Registry(tmp_path).publish(make_scorer(1))
    Decisions(tmp_path, "a").scorer(0)
    with pytest.raises(StateMismatch, match="version 2 for interval 0"):
        Decisions(tmp_path, "a").scorer(0, expected=2)
    (tmp_path / "registry" / "00000001.safetensors").unlink()
    with pytest.raises(ScorerRejected, match="cannot be replayed"):
        Decisions(tmp_path, "a").scorer(0, expected=1)
    with pytest.raises(ScorerRejected, match="cannot be replayed"):
        Decisions(tmp_path, "a").scorer(0, strict=True)
    with pytest.warns(RuntimeWarning, match="Training goes on"):
        assert Decisions(tmp_path, "a").scorer(0) == (UNIFORM, None)


def test_a_damaged_ledger_stops_a_start_and_not_a_run(tmp_path):
    Registry(tmp_path).publish(make_scorer(1))
    ledger = Ledger(tmp_path, "a")
    Decisions(tmp_path, "a").scorer(0)
    Path(ledger.directory, "00000000.json").write_bytes(b"{")
    with pytest.raises(StateMismatch, match="damaged"):
        Decisions(tmp_path, "a").scorer(0, strict=True)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert Decisions(tmp_path, "a").scorer(0) == (UNIFORM, None)
