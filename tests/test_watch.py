"""The hot lane knows the newest version at once, whatever the store does."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter

import pytest
from hotlane import make_scorer

from metagrad_filter.errors import ConfigError
from metagrad_filter.kvstore import KvStore
from metagrad_filter.registry import Registry
from metagrad_filter.store import LocalStore
from metagrad_filter.watch import Watcher

_numbers = itertools.count()


class Watched(LocalStore):
    """A directory that counts calls and can be made to hang or fail."""

    def __init__(self, directory):
        super().__init__(directory)
        self.calls: Counter[str] = Counter()
        self.open = threading.Event()
        self.open.set()
        self.error: BaseException | None = None
        self.constant = None

    def _meet(self, name):
        self.calls[name] += 1
        self.open.wait()
        if self.error is not None:
            raise self.error

    def read(self, key, limit):
        self._meet("read")
        return super().read(key, limit)

    def names(self, folder):
        self._meet("names")
        return super().names(folder)

    def stamp(self, folder):
        self._meet("stamp")
        return self.constant or super().stamp(folder)


@pytest.fixture
def store(tmp_path):
    store = Watched(tmp_path)
    yield store
    store.open.set()


def watch(store, **options):
    return Watcher(Registry(store), **{"interval": 0.005, "timeout": 30, **options})


def version_of(watcher):
    found = watcher.newest()
    return None if found is None else found.version


def until(condition):
    """Waits for what another thread does, and fails where it seems never to be done."""
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("waited for a minute")


def looks(store, count=3):
    """Waits for some more looks."""
    goal = store.calls["stamp"] + count
    until(lambda: store.calls["stamp"] >= goal)


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_published_versions_come_into_service(tmp_path, kind):
    place = LocalStore(tmp_path) if kind == "directory" else KvStore(f"memory://w{next(_numbers)}")
    publisher = Registry(place)
    with_none = watch(place)
    assert with_none.newest() is None
    publisher.publish(make_scorer(0))
    until(with_none.newest)
    watcher = watch(place)
    for expected in (1, 2, 3):
        until(lambda: version_of(watcher) == expected)  # noqa: B023
        version, scorer, manifest = watcher.newest()  # pyright: ignore[reportGeneralTypeIssues]
        assert scorer.metadata == {"seed": version - 1}
        assert manifest == publisher.manifest(version)
        publisher.publish(make_scorer(version))
    watcher.close()
    with_none.close()


def test_the_first_look_is_waited_for(store):
    Registry(store).publish(make_scorer())
    watcher = watch(store)
    assert version_of(watcher) == 1
    watcher.close()


def test_a_store_that_hangs_blocks_nobody(store):
    Registry(store).publish(make_scorer(0))
    store.open.clear()
    watcher = watch(store, timeout=0.02)
    # None of these calls returns before the store does, were they to wait for it.
    with pytest.warns(RuntimeWarning, match=r"has not answered within 0\.02 s") as caught:
        assert [watcher.newest() for _ in range(1000)] == [None] * 1000
    assert len(caught) == 1 and watcher.errors == {"slow": 1}
    store.open.set()
    until(lambda: version_of(watcher) == 1)
    store.open.clear()
    Registry(LocalStore(store.directory)).publish(make_scorer(1))
    assert [version_of(watcher) for _ in range(1000)] == [1] * 1000
    store.open.set()
    until(lambda: version_of(watcher) == 2)
    watcher.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("gone"), "unreachable"),
        (PermissionError("no"), "unreachable"),
        (TimeoutError("late"), "timeout"),
        (ConfigError("forked"), "ConfigError"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError"),
    ],
)
def test_a_store_that_fails_is_counted_and_warned_about_once(store, error, reason):
    Registry(store).publish(make_scorer(0))
    watcher = watch(store)
    assert version_of(watcher) == 1
    store.error = error
    looks(store)
    with pytest.warns(RuntimeWarning, match=f"{error}.*version 1 stays in service") as caught:
        assert version_of(watcher) == 1
    looks(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert version_of(watcher) == 1
    assert len(caught) == 1 and watcher.errors[reason] >= 3 and len(watcher.errors) == 1
    store.error = None
    Registry(LocalStore(store.directory)).publish(make_scorer(1))
    until(lambda: version_of(watcher) == 2)
    watcher.close()


def test_a_store_that_fails_from_the_start_gives_none(store):
    store.error = OSError("no route")
    watcher = watch(store)
    with pytest.warns(RuntimeWarning, match="no version stays in service"):
        assert watcher.newest() is None
    watcher.close()


def test_a_run_that_vanishes_or_goes_back_keeps_its_version(store):
    publisher = Registry(LocalStore(store.directory))
    for seed in range(2):
        publisher.publish(make_scorer(seed))
    watcher = watch(store)
    assert version_of(watcher) == 2
    folder, hidden = store.directory / "registry", store.directory / "hidden"
    (folder / "00000002.json").rename(store.directory / "00000002.json")
    until(lambda: watcher.rejections["rollback"])
    with pytest.warns(RuntimeWarning, match="rollback"):
        assert version_of(watcher) == 2
    folder.rename(hidden)
    looks(store)
    assert version_of(watcher) == 2
    hidden.rename(folder)
    (store.directory / "00000002.json").rename(folder / "00000002.json")
    publisher.publish(make_scorer(2))
    until(lambda: version_of(watcher) == 3)
    watcher.close()


def test_a_damaged_version_is_read_once_and_an_unreadable_one_again(store):
    publisher = Registry(LocalStore(store.directory))
    for seed in range(2):
        publisher.publish(make_scorer(seed))
    payload = store.directory / "registry" / "00000002.safetensors"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1])
    watcher = watch(store)
    with pytest.warns(RuntimeWarning, match=r"version 2 \(truncated\)"):
        assert version_of(watcher) == 1
    looks(store)
    assert watcher.rejections == {"truncated": 1}
    publisher.publish(make_scorer(2))
    until(lambda: version_of(watcher) == 3)
    payload = store.directory / "registry" / "00000004.safetensors"
    payload.mkdir()
    (store.directory / "registry" / "00000004.json").symlink_to("nowhere")
    until(lambda: watcher.rejections["unreadable"] > 2)
    with pytest.warns(RuntimeWarning, match=r"version 4 \(unreadable\)") as caught:
        looks(store)
        assert version_of(watcher) == 3
    assert len(caught) == 1
    watcher.close()


def test_an_unchanged_directory_costs_one_stat_a_look(store):
    Registry(store).publish(make_scorer(0))
    watcher = watch(store)
    assert version_of(watcher) == 1
    looks(store)
    before = store.calls.copy()
    looks(store, 120)
    spent = store.calls - before
    assert spent["stamp"] >= 120 and spent["read"] == 0
    # Once in sixty looks it lists, and reads nothing.
    assert spent["names"] <= spent["stamp"] // 60 + 1
    watcher.close()


def test_a_coarse_time_stamp_hides_no_version_for_long(store):
    store.constant = (1, 1, 1)
    Registry(store).publish(make_scorer(0))
    watcher = watch(store)
    assert version_of(watcher) == 1
    for version in (2, 3):
        looks(store, 5)
        Registry(LocalStore(store.directory)).publish(make_scorer(version))
        until(lambda: version_of(watcher) == version)  # noqa: B023
    watcher.close()


def threads():
    return sum(t.name == "metagrad-filter-watch" for t in threading.enumerate())


def test_watchers_of_one_run_share_one_thread(tmp_path):
    until(lambda: threads() == 0)
    Registry(tmp_path).publish(make_scorer(0))
    places = [tmp_path, str(tmp_path), f"file://{tmp_path}", os.path.relpath(tmp_path)]
    watchers = [watch(places[n % 4]) for n in range(100)]
    assert threads() == 0
    for watcher in watchers:
        assert version_of(watcher) == 1 and threads() == 1
    for watcher in watchers[:99]:
        watcher.close()
        watcher.close()
    assert threads() == 1
    watchers[99].close()
    until(lambda: threads() == 0)
    assert version_of(watchers[0]) == 1 and threads() == 0
    # One that nobody closes ends with its last reference.
    watchers = [watch(tmp_path)]
    assert version_of(watchers[0]) == 1 and threads() == 1
    watchers.clear()
    gc.collect()
    until(lambda: threads() == 0)


def test_the_fastest_of_several_watchers_sets_the_pace(store):
    Registry(store).publish(make_scorer(0))
    slow, fast = watch(store, interval=3600), watch(store)
    assert (version_of(slow), version_of(fast)) == (1, 1)
    Registry(LocalStore(store.directory)).publish(make_scorer(1))
    until(lambda: version_of(slow) == 2)
    slow.close()
    fast.close()


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 0},
        {"interval": float("nan")},
        {"interval": float("inf")},
        {"interval": "1"},
        {"timeout": -1},
        {"timeout": None},
    ],
)
def test_times_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Watcher(Registry(tmp_path), **options)


FORKED = """
import os, sys
from hotlane import make_scorer
from test_watch import until
from metagrad_filter.registry import Registry
from metagrad_filter.watch import Watcher
registry = Registry(sys.argv[1])
registry.publish(make_scorer(1))
watcher = Watcher(registry, interval=0.01, timeout=60)
assert watcher.newest().version == 1
for _ in range(20):
    child = os.fork()
    if child == 0:
        assert watcher.newest().version >= 1
        Registry(sys.argv[1]).publish(make_scorer(2))
        newest = registry.latest()
        until(lambda: watcher.newest().version >= newest)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
until(lambda: watcher.newest().version == 21)
"""


def test_a_forked_process_knows_what_its_parent_knew_and_looks_on(tmp_path):
    run(FORKED, str(tmp_path))


ENDING = """
import sys, threading
from hotlane import make_scorer
from metagrad_filter.registry import Registry
from metagrad_filter.store import LocalStore
from metagrad_filter.watch import Watcher
if sys.argv[2] == "hangs":
    class Hanging(LocalStore):
        def stamp(self, folder):
            threading.Event().wait()
    store = Hanging(sys.argv[1])
else:
    store = sys.argv[1]
    Registry(store).publish(make_scorer())
watcher = Watcher(Registry(store), interval=0.001, timeout=60 if sys.argv[2] == "works" else 0.01)
import warnings
warnings.simplefilter("ignore")
print(watcher.newest())
"""


@pytest.mark.parametrize("place", ["hangs", "works", "memory"])
def test_an_interpreter_that_watches_comes_to_its_end(tmp_path, place):
    run(ENDING, *(("memory://x", "works") if place == "memory" else (str(tmp_path), place)))


def run(program, *arguments):
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=os.path.dirname(__file__),
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )


def test_a_refresh_sees_what_was_published_just_before_it(tmp_path):
    store = Watched(tmp_path)
    watcher = watch(store, interval=3600.0)
    assert watcher.refresh(30) is None
    for version in (1, 2, 3):
        Registry(LocalStore(tmp_path)).publish(make_scorer(version))
        found = watcher.refresh(30)
        assert found is not None and found.version == version


def test_a_refresh_that_is_not_answered_gives_what_was_known(store):
    watcher = watch(store, interval=3600.0)
    Registry(LocalStore(store.directory)).publish(make_scorer(1))
    assert version_of(watcher) == 1
    Registry(LocalStore(store.directory)).publish(make_scorer(2))
    store.open.clear()
    found = watcher.refresh(0.02)
    assert found is not None and found.version == 1
    store.open.set()
    found = watcher.refresh(30)
    assert found is not None and found.version == 2
    watcher.close()
    assert watcher.refresh(30) == found
