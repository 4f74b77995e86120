"""One suite for every store, and what is particular to directories and to URLs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import store_checks
from hotlane import make_scorer

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError
from metagrad_filter.inspection import inspect_run
from metagrad_filter.kvstore import KvStore
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry
from metagrad_filter.store import LocalStore, check_key, open_store

_numbers = itertools.count()


@pytest.fixture(params=["directory", "file", "memory"])
def again(request, tmp_path):
    place = tmp_path / "run"
    url = {"file": f"file://{place}", "memory": f"memory://test-{next(_numbers)}/run"}
    if request.param == "directory":
        return lambda: LocalStore(place)
    return lambda: KvStore(url[request.param])


@pytest.mark.parametrize("check", store_checks.CHECKS, ids=lambda check: check.__name__)
def test_every_store(check, again):
    check(again)


def test_paths_and_urls_open_their_stores(tmp_path):
    for place in (str(tmp_path), tmp_path, f"file://{tmp_path}", f"file://localhost{tmp_path}"):
        store = open_store(place)
        assert isinstance(store, LocalStore) and store.describe("a/b") == tmp_path / "a" / "b"
    assert open_store("file:///a%20b").describe() == Path("/a b")
    for url in ("memory://x", "s3://bucket/run", "gs://bucket/run/"):
        store = open_store(url)
        assert isinstance(store, KvStore)
        assert store.describe("a") == url.rstrip("/") + "/a"
        assert open_store(store) is store
    assert str(Registry("memory://x").directory) == "memory://x/registry"
    assert str(Ledger("memory://x", "a").directory) == "memory://x/ledger/a"
    assert Registry(tmp_path).directory == tmp_path / "registry"


@pytest.mark.parametrize(
    "url",
    [
        "http://host/x", "S3://bucket/x", "ftp://x", "zarr://x", "://x", "file://host/x", 3, None,
        "file:///x?a=1", "s3://", "s3:///", "gs://", "memory://", "s3://bucket/x?versionId=1",
        "gs://bucket/x#f", "a\0b", "file:///a%00b", b"bytes", Path("s3://bucket/x"),
    ],
)  # fmt: skip
def test_urls_that_no_store_reads_are_refused(url):
    with pytest.raises(ConfigError, match=r"expected|lost a slash"):
        mgf.Registry(url)
    with pytest.raises(ConfigError, match=r"expected|lost a slash"):
        mgf.Ledger(url, "a")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_name_that_cannot_be_is_refused_when_it_is_used(scheme):
    with pytest.raises(ConfigError, match="bucket name"):
        Registry(f"{scheme}://x/run").versions()


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", None])
def test_a_store_needs_a_positive_timeout(timeout):
    with pytest.raises(ConfigError, match="timeout"):
        KvStore("memory://x", timeout=timeout)


def test_one_memory_store_per_url():
    first = f"memory://test-{next(_numbers)}"
    assert Registry(first).publish(make_scorer()) == 1
    assert Registry(first + "/").versions() == [1]
    assert Registry(first + "0").versions() == []


def test_a_bucket_out_of_reach_fails_within_its_timeout(monkeypatch):
    # Nothing listens on port 9; the retries of the driver would take longer.
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = KvStore("s3://out-of-reach/run", timeout=0.2)
    with pytest.raises(TimeoutError, match=r"0\.2 s"):
        store.read("a/x", 10)
    with pytest.raises(mgf.PublishFailed, match="s3://out-of-reach/run/registry"):
        Registry(store).publish(make_scorer())


FORKED = """
import os, sys
from metagrad_filter.errors import ConfigError
from metagrad_filter.kvstore import KvStore
store = KvStore(sys.argv[1])
store.write_once("a/x", b"1")
if os.fork() == 0:
    try:
        store.read("a/x", 10)
    except ConfigError as error:
        os._exit(7 if "spawn" in str(error) else 8)
    os._exit(9)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_process_is_told_rather_than_ended(tmp_path):
    program = [sys.executable, "-c", FORKED, f"file://{tmp_path}"]
    assert subprocess.run(program).returncode == 7


def test_local_files_are_served_without_tensorstore(tmp_path):
    program = """
import sys
from metagrad_filter.ledger import Ledger
from metagrad_filter.registry import Registry
Ledger(sys.argv[1]).decide(0, 0)
Registry("file://" + sys.argv[1]).reject(None, "x")
assert "tensorstore" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


@pytest.mark.parametrize("kind", ["directory", "pipe", "symlink", "huge", "link_to_folder"])
def test_a_directory_serves_regular_files_only(tmp_path, kind):
    store = LocalStore(tmp_path / "run")
    store.write_once("a/x", b"1")
    path = tmp_path / "run" / "a" / "y"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "symlink":
        path.symlink_to(path.parent / "x")
    elif kind == "link_to_folder":
        path.symlink_to(tmp_path)
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises((OSError, ValueError)) as error:
        store.read("a/y", 10)
    assert not isinstance(error.value, FileNotFoundError)
    assert store.write_once("a/y", b"2") is False


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path):
    store = LocalStore(tmp_path)
    store.write_once("a", b"1")
    for call in (
        lambda: store.write_once("a/x", b"1"),
        lambda: store.names("a"),
        lambda: store.exclusive("a").__enter__(),
    ):
        with pytest.raises(NotADirectoryError):
            call()


def test_what_lies_beside_a_run_is_not_inspected(tmp_path):
    Ledger(tmp_path, "train").decide(0, 0)
    for name in ("stray", "Other", ".hidden", "a b"):
        (tmp_path / "ledger" / name).touch()
    (tmp_path / "ledger" / "Folder").mkdir()
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "rejected-x y.json").touch()
    assert inspect_run(tmp_path) == {
        "versions": [],
        "ledgers": {"train": [{"interval": 0, "version": 0}]},
        "rejected": [],
        "rounds": [],
    }


def test_what_is_written_is_private(tmp_path):
    LocalStore(tmp_path / "a" / "b").write_once("c/d", b"1")
    status = (tmp_path / "a" / "b" / "c" / "d").stat()
    assert status.st_mode & 0o777 == 0o600 and status.st_nlink == 1


HOSTILE_PARTS = [
    "..", ".", "/", "\\", "\0", "~", "a", "B", "0", "-", "_", " ", "\n", "%2e%2e", "%2f", "ä", "..",
    "\u2024\u2024", "\uff0e", "\u2215", "\u202e", "\ud800", "CON", ":", "*", "$HOME", "/etc/passwd",
    "x" * 200, "../" * 9, "é", "\u017f", "\u0131", "\u0663", "json", "00000001", "//", "s3://",
]  # fmt: skip


def test_no_name_leads_out_of_the_run(tmp_path):
    root = tmp_path / "outside" / "run"
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 100_000)
    picks = rng.integers(0, len(HOSTILE_PARTS), lengths.sum())
    store, ends, accepted = LocalStore(root), lengths.cumsum(), 0
    for start, end in zip(ends - lengths, ends):
        name = "".join(HOSTILE_PARTS[i] for i in picks[start:end])
        try:
            ledger = Ledger(store, name)
            assert name.isascii() and Path(ledger.directory).parent == root / "ledger"
            accepted += 1
        except ConfigError:
            pass
        try:
            place = store.describe(check_key(name))
            assert root in place.parents and ".." not in place.parts
            accepted += 1
            if accepted % 16 == 0:
                store.write_once(name, b"x")
        except (ConfigError, OSError):  # a name can be a folder already
            pass
    assert accepted > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["outside"]
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["run"]
    assert sum(p.is_file() for p in root.rglob("*")) > 50


WRITER = """
import json, sys
from metagrad_filter.kvstore import KvStore
from metagrad_filter.ledger import Ledger
place, start = sys.argv[1], int(sys.argv[2])
ledger = Ledger(KvStore(place) if place.startswith("file://") else place)
print(json.dumps([ledger.decide(i, start + i) for i in range(200)]))
"""


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_processes_agree_on_every_decision(tmp_path, scheme):
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, f"{scheme}{tmp_path}", str(1000 * n)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(1, 5)
    ]
    answers = [json.loads(program.communicate()[0]) for program in programs]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] == [e.version for e in Ledger(tmp_path).entries().values()]
