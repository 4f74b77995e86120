"""What every store promises, as checks that run on a directory, a URL or a bucket alike.

A check takes `again`, which returns a new store object on one place that was empty at first.
"""

from __future__ import annotations

import json
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
from hotlane import make_scorer, make_windows

from metagrad_filter.errors import ConfigError, PublishFailed, ScorerRejected, StateMismatch
from metagrad_filter.inspection import inspect_run
from metagrad_filter.ledger import Entry, Ledger
from metagrad_filter.registry import Registry
from metagrad_filter.store import Store

Again = Callable[[], Store]

HOSTILE_KEYS = [
    "", ".", "..", "/", "/etc/x", "../x", "a/../x", "a/..", "a//b", "a/", "a/./b", "a\\b", "a\0b",
    "a\n", "ä", "a b", "a/\uff0e\uff0e/b", "%2e%2e/x", "a" * 129, "~", "C:x", None, 3, b"a",
]  # fmt: skip


def versions_of(place: Registry) -> list[int]:
    found = place.versions()
    assert found == sorted(set(found))
    return found


def reason_for(registry: Registry, version: int) -> str:
    with pytest.raises(ScorerRejected) as error:
        registry.load(version)
    assert str(registry.store.describe()) in str(error.value) or error.value.reason not in (
        "missing",
        "unreadable",
    )
    return error.value.reason


def replace(store: Store, key: str, data: bytes | None) -> None:
    """Does to a key what nobody may do."""
    store.remove(key)
    if data is not None:
        assert store.write_once(key, data)


def newest(registry: Registry) -> int | None:
    """The newest verified version, with warnings off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = registry.latest_verified()
    return None if found is None else found[0]


def keys_are_written_once(again: Again) -> None:
    store = again()
    values = {"a/x": b"", "a/y": b"one", "a/b/z": bytes(range(256)) * 4096, "c/.d-e_F": b"\0"}
    for key, value in values.items():
        assert store.write_once(key, value) is True
        assert store.write_once(key, b"another") is False
        assert again().write_once(key, value) is False
    for key, value in values.items():
        assert again().read(key, 2**21) == value
    assert sorted(store.names("a")) == ["b", "x", "y"]
    assert (store.names("a/b"), again().names("c")) == (["z"], [".d-e_F"])


def missing_keys_are_told_by_type(again: Again) -> None:
    store = again()
    assert store.names("a") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/x", 10)
    store.write_once("a/x", b"1")
    for key in ("a/y", "b/x"):
        with pytest.raises(FileNotFoundError):
            store.read(key, 10)
        store.remove(key)
    store.remove("a/x")
    assert store.names("a") == []


def reads_are_bounded(again: Again) -> None:
    store = again()
    store.write_once("a/x", b"0123456789")
    assert store.read("a/x", 10) == store.read("a/x", 2**26) == b"0123456789"
    for limit in (0, 1, 9):
        with pytest.raises(ValueError, match=f"the {limit}"):
            store.read("a/x", limit)
    store.write_once("a/empty", b"")
    assert store.read("a/empty", 0) == b""


def keys_cannot_leave(again: Again) -> None:
    store = again()
    calls = [
        lambda key: store.read(key, 10),
        lambda key: store.write_once(key, b"x"),
        lambda key: store.names(key),
        lambda key: store.remove(key),
    ]
    for key in HOSTILE_KEYS:
        for call in calls:
            with pytest.raises(ConfigError, match="key is"):
                call(key)


def stores_travel_to_other_processes(again: Again) -> None:
    store = again()
    store.write_once("a/x", b"1")
    for thing in (store, Registry(store), Ledger(store, "train")):
        data = pickle.dumps(thing)
        assert len(data) < 1000
        copy = pickle.loads(data)
        inner = copy if isinstance(copy, Store) else copy.store
        assert inner.read("a/x", 9) == b"1" and inner.describe() == store.describe()


def one_of_many_threads_writes_a_key(again: Again) -> None:
    workers, keys = 4, 25
    wins = np.zeros((workers, keys), bool)
    start = threading.Barrier(workers)

    def write(worker: int) -> None:
        store = again()
        start.wait()
        for key in range(keys):
            wins[worker, key] = store.write_once(f"a/{key}", bytes([worker]))

    in_threads(write, workers)
    assert (wins.sum(axis=0) == 1).all()
    store = again()
    written = [store.read(f"a/{key}", 1)[0] for key in range(keys)]
    assert written == wins.argmax(axis=0).tolist()


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def versions_grow_and_load_as_published(again: Again) -> None:
    registry = Registry(again())
    assert (registry.latest(), versions_of(registry), registry.latest_verified()) == (
        None,
        [],
        None,
    )
    scorers = [make_scorer(seed) for seed in range(3)]
    assert [registry.publish(s, {"round": i}) for i, s in enumerate(scorers)] == [1, 2, 3]
    windows = make_windows(5)
    for version, scorer in enumerate(scorers, 1):
        loaded, manifest = Registry(again()).load_with_manifest(version)
        assert loaded.score(windows).tobytes() == scorer.score(windows).tobytes()
        assert loaded.metadata == {"seed": version - 1, "round": version - 1}
        assert manifest == registry.manifest(version) and manifest["version"] == version
    assert newest(registry) == 3
    older = registry.latest_verified(below=3)
    assert older is not None and older[0] == 2
    assert reason_for(registry, 4) == "missing"


def rejected_candidates_leave_a_record(again: Again) -> None:
    registry = Registry(again())
    registry.reject(None, "no_labels")
    place = registry.reject(make_scorer(5), "gate", {"correlation": 0.1})
    assert place == registry.store.describe("registry/rejected-2.json")
    record = json.loads(again().read("registry/rejected-2.json", 10**6))
    assert record == {"reason": "gate", "metadata": {"seed": 5, "correlation": 0.1}}
    assert versions_of(registry) == []
    with pytest.raises(ConfigError):
        registry.reject(None, "x", {"bad": object()})


def damaged_versions_are_refused_and_the_older_one_serves(again: Again) -> None:
    store = again()
    for seed in range(2):
        Registry(store).publish(make_scorer(seed))
    keys = [f"registry/00000002.{suffix}" for suffix in ("json", "safetensors")]
    whole = {key: store.read(key, 2**26) for key in keys}
    other = store.read("registry/00000001.safetensors", 2**26)
    rng = np.random.default_rng(0)
    for key, data in whole.items():
        damaged = [None, b"", data[:-1], data + b"\0", data[: len(data) // 2], b"\x80\x04N."]
        damaged += [(2**63 - 1).to_bytes(8, "little") + data[8:], b"[" * 5000, b"\0" * 2**21]
        damaged += [other] if key.endswith("safetensors") else [b"{}", b"null"]
        for _ in range(12):
            flipped = bytearray(data)
            flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
        for value in damaged:
            replace(store, key, value)
            reader = Registry(again())
            assert reason_for(reader, 2) != "rollback"
            assert newest(reader) == 1
            # A manifest that is not there is a version that does not exist yet.
            listed = not (value is None and key.endswith("json"))
            assert reader.rejections.total() == int(listed), (key, value and value[:20])
        replace(store, key, data)
    assert newest(Registry(store)) == 2


def what_was_verified_is_not_taken_back(again: Again) -> None:
    store, reader = again(), Registry(again())
    for seed in range(5):
        Registry(store).publish(make_scorer(seed))
    assert newest(reader) == 5
    suffixes = ("json", "safetensors")
    kept = {(v, s): store.read(f"registry/0000000{v}.{s}", 2**26) for v in (4, 5) for s in suffixes}

    def put(version: int, manifest: bytes | None, payload: bytes | None) -> None:
        replace(store, f"registry/0000000{version}.json", manifest)
        replace(store, f"registry/0000000{version}.safetensors", payload)

    # Version 4 offered after version 5, and again: warned about once, counted every time.
    put(5, None, None)
    with pytest.warns(RuntimeWarning, match=r"version 5 \(rollback\).*no longer has version 5"):
        assert reader.latest_verified() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader.latest_verified() is None
    assert reader.rejections == {"rollback": 2}
    # Whoever replays an older decision may still read it, and a new reader knows no better.
    assert reader.load(4).metadata == {"seed": 3} and newest(Registry(again())) == 4
    # Version 4 under the number 5; version 5's manifest with version 4's payload.
    put(5, kept[4, "json"], kept[4, "safetensors"])
    assert reason_for(reader, 5) == "version"
    put(5, kept[5, "json"], kept[4, "safetensors"])
    assert reason_for(reader, 5) in ("sha256", "truncated")
    # The same number, sealed anew over another scorer.
    put(5, None, None)
    assert Registry(store).publish(make_scorer(77)) == 5
    assert reason_for(reader, 5) == "changed" and Registry(again()).load(5).metadata == {"seed": 77}
    # A newer version that is there and fails lets the older one serve.
    assert newest(reader) == 4 and reader.rejections["changed"] == 1
    put(5, kept[5, "json"], kept[5, "safetensors"])
    assert newest(reader) == 5
    # A lost version does not stand in the way of a newer one.
    put(5, None, None)
    store.write_once("registry/00000006.json", b"{")
    assert newest(reader) is None
    assert Registry(store).publish(make_scorer(8)) == 7 and newest(reader) == 7


def what_is_out_of_reach_is_no_reason_to_go_back(again: Again) -> None:
    for seed in range(2):
        Registry(again()).publish(make_scorer(seed))
    faulty = Faulty(again(), 0, error=TimeoutError("late"))
    reader = Registry(faulty)
    assert newest(reader) == 2
    for call in (2, 3):
        faulty.left = call
        assert newest(reader) is None
    assert reader.rejections == {"unreadable": 2} and newest(reader) == 2
    # To a reader that knows no version yet, the older one is better than none.
    faulty.left = 2
    assert newest(Registry(faulty)) == 1


def a_publisher_reuses_no_number(again: Again) -> None:
    store, registry = again(), Registry(again())
    assert [registry.publish(make_scorer(n)) for n in range(2)] == [1, 2]
    for suffix in ("json", "safetensors"):
        store.remove(f"registry/00000002.{suffix}")
    assert registry.publish(make_scorer(5)) == 3
    # A payload without manifest keeps its number.
    store.write_once("registry/00000004.safetensors", b"orphan")
    assert Registry(again()).publish(make_scorer(6)) == 5
    assert versions_of(registry) == [1, 3, 5]


def two_publishers_share_the_numbers(again: Again) -> None:
    published: list[list[int]] = [[], []]

    def publish(worker: int) -> None:
        registry = Registry(again())
        for n in range(6):
            published[worker].append(registry.publish(make_scorer(100 * worker + n)))

    in_threads(publish, 2)
    assert all(versions == sorted(versions) for versions in published)
    assert len(set(published[0]) | set(published[1])) == 12
    registry = Registry(again())
    assert versions_of(registry) == sorted(published[0] + published[1])
    for worker, versions in enumerate(published):
        seeds = [registry.load(v).metadata["seed"] for v in versions]
        assert seeds == [100 * worker + n for n in range(6)]


def first_decisions_stay(again: Again) -> None:
    ledger = Ledger(again(), "train")
    assert ledger.read(0) is None and ledger.entries() == {}
    assert ledger.decide(0, 0) == 0
    assert ledger.decide(3, 7, "ab") == 7
    assert Ledger(again(), "train").decide(3, 9, "cd") == 7
    assert Ledger(again(), "train").entries() == {0: Entry(0, 0, ""), 3: Entry(3, 7, "ab")}
    assert again().read("ledger/train/00000003.json", 100) == (
        b'{"interval":3,"manifest_sha256":"ab","version":7}'
    )
    assert ledger.decide(10**8 + 1, 7) == 7 and list(ledger.entries()) == [0, 3, 10**8 + 1]
    assert Ledger(again(), "other").entries() == {}
    fork = ledger.fork("other", up_to=2)
    assert list(fork.entries()) == [0] and fork.decide(3, 8) == 8
    with pytest.raises(StateMismatch, match="interval 3"):
        ledger.fork("other")


def another_configuration_is_refused(again: Again) -> None:
    Ledger(again()).bind({"seed": 0, "keep_ratio": "1/4"})
    Ledger(again()).bind({"keep_ratio": "1/4", "seed": 0})
    with pytest.raises(StateMismatch, match="keep_ratio='1/4' and now has '1/2'"):
        Ledger(again()).bind({"seed": 0, "keep_ratio": "1/2"})


def damaged_decisions_are_noticed(again: Again) -> None:
    store, ledger = again(), Ledger(again())
    ledger.decide(4, 5, "0" * 64)
    ledger.bind({"seed": 0})
    for key, call in (
        ("ledger/default/00000004.json", lambda: ledger.read(4)),
        ("ledger/default/filter.json", lambda: ledger.bind({"seed": 0})),
    ):
        for value in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 9000, b" " * 2**17):
            replace(store, key, value)
            with pytest.raises(StateMismatch, match="damaged") as error:
                call()
            assert str(store.describe(key)) in str(error.value)


def threads_agree_on_every_decision(again: Again) -> None:
    decided: list[list[int]] = [[], [], [], []]

    def decide(worker: int) -> None:
        ledger = Ledger(again())
        for interval in range(20):
            decided[worker].append(ledger.decide(interval, 1000 * (worker + 1) + interval))

    in_threads(decide, 4)
    assert decided[0] == decided[1] == decided[2] == decided[3]
    assert decided[0] == [entry.version for entry in Ledger(again()).entries().values()]


def runs_can_be_inspected(again: Again) -> None:
    store = again()
    with pytest.raises(ConfigError, match="not a run directory"):
        inspect_run(store)
    registry = Registry(store)
    for n in range(2):
        registry.publish(make_scorer(n), {"round": n})
    replace(store, "registry/00000002.safetensors", b"")
    registry.reject(None, "gate")
    Ledger(store, "train").decide(0, 1)
    store.write_once("rounds/round-1.json", b'{"round":1}')
    store.write_once("rounds/round-2.json", b"{")
    found = json.loads(json.dumps(inspect_run(again())))
    assert [(v["version"], v["state"]) for v in found["versions"]] == [
        (1, "ok"),
        (2, "refused (truncated)"),
    ]
    assert found["ledgers"] == {"train": [{"interval": 0, "version": 1}]}
    assert found["rejected"] == [{"reason": "gate", "metadata": {}}]
    assert found["rounds"] == [{"round": 1}, {"reason": "round-2.json is damaged"}]


class Faulty:
    """A store whose n-th call fails, dies or loses its effect.

    Args:
      inner: the store that works.
      n: the call, from 1, that goes wrong; 0 for none.
      how: "before": it raises without effect; "after": with; "lost": a write or removal reports
        success and does nothing, a listing is empty, a read finds nothing.
      error: what is raised.
    """

    def __init__(
        self, inner: Store, n: int, how: str = "before", error: BaseException | None = None
    ):
        self.inner = inner
        self.left = n
        self.how = how
        self.error = error or OSError("injected")

    def _call(self, call, lost):
        self.left -= 1
        if self.left != 0:
            return call()
        if self.how == "lost":
            return lost()
        if self.how == "after":
            call()
        raise self.error

    def describe(self, key: str = ""):
        return self.inner.describe(key)

    def read(self, key: str, limit: int) -> bytes:
        def lost():
            raise FileNotFoundError(key)

        return self._call(lambda: self.inner.read(key, limit), lost)

    def write_once(self, key: str, data: bytes) -> bool:
        return self._call(lambda: self.inner.write_once(key, data), lambda: True)

    def names(self, folder: str) -> list[str]:
        return self._call(lambda: self.inner.names(folder), list)

    def remove(self, key: str) -> None:
        self._call(lambda: self.inner.remove(key), lambda: None)

    def stamp(self, folder: str):
        return self.inner.stamp(folder)

    def exclusive(self, folder: str) -> AbstractContextManager[bool]:
        return self.inner.exclusive(folder)


class Killed(BaseException):
    """The publisher's process ended here."""


def readers_see_old_or_new_whatever_call_goes_wrong(again: Again) -> None:
    store = again()
    assert Registry(store).publish(make_scorer(0)) == 1
    for how, error in (
        ("before", OSError("injected")),
        ("after", OSError("injected")),
        ("before", TimeoutError("injected")),
        ("before", Killed()),
        ("after", Killed()),
        ("lost", None),
    ):
        for n in range(1, 20):
            old = newest(Registry(store))
            faulty = Faulty(store, n, how, error)
            outcome = None
            try:
                outcome = Registry(faulty).publish(make_scorer(1000 + n))
            except PublishFailed as failure:
                assert isinstance(error, OSError) and "injected" in str(failure)
            except Killed:
                assert isinstance(error, Killed)
            seen = newest(Registry(again()))
            assert seen == old or (seen or 0) > (old or 0)
            if outcome is not None and how != "lost":
                assert seen == outcome
            after = Registry(again()).publish(make_scorer(2000 + n))
            assert newest(Registry(again())) == after > (seen or 0)
            if faulty.left > 0:
                assert n > 3
                break
        else:
            raise AssertionError("publish never ran to its end")


def decisions_survive_whatever_call_goes_wrong(again: Again) -> None:
    store = again()
    for how, error in (("before", OSError()), ("after", OSError()), ("after", Killed())):
        for n in range(1, 10):
            name = f"{how}-{type(error).__name__}-{n}".lower()
            faulty = Faulty(store, n, how, error)
            try:
                decided = Ledger(faulty, name).decide(7, 3, "ab")
                assert decided == 3
            except (OSError, Killed):
                pass
            # Decided or not, one answer from now on.
            recorded = Ledger(again(), name).read(7)
            expected = 9 if recorded is None else 3
            assert [Ledger(again(), name).decide(7, v) for v in (9, 10)] == [expected] * 2
            if faulty.left > 0:
                break


CHECKS = [
    keys_are_written_once,
    missing_keys_are_told_by_type,
    reads_are_bounded,
    keys_cannot_leave,
    stores_travel_to_other_processes,
    one_of_many_threads_writes_a_key,
    versions_grow_and_load_as_published,
    rejected_candidates_leave_a_record,
    damaged_versions_are_refused_and_the_older_one_serves,
    what_was_verified_is_not_taken_back,
    what_is_out_of_reach_is_no_reason_to_go_back,
    a_publisher_reuses_no_number,
    two_publishers_share_the_numbers,
    first_decisions_stay,
    another_configuration_is_refused,
    damaged_decisions_are_noticed,
    threads_agree_on_every_decision,
    runs_can_be_inspected,
    readers_see_old_or_new_whatever_call_goes_wrong,
    decisions_survive_whatever_call_goes_wrong,
]
