"""A reader sees a complete version or the previous one, whoever dies while publishing.

What holds for every store is in `store_checks.py`; here are directories: killed processes, failing
system calls, a power loss, and files that are not what they seem.
"""

import errno
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotlane import make_scorer

from metagrad_filter import store as store_module
from metagrad_filter.errors import PublishFailed, ScorerRejected
from metagrad_filter.registry import Registry

SYSTEM_CALLS = ("open", "write", "fsync", "link", "unlink", "close", "listdir")


def run_program(program: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )


def files(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "registry").iterdir())


def test_a_version_is_two_files(tmp_path):
    registry = Registry(tmp_path)
    assert [registry.publish(make_scorer(seed)) for seed in range(3)] == [1, 2, 3]
    assert files(tmp_path) == sorted(
        [".lock", *(f"{v:08d}.{s}" for v in (1, 2, 3) for s in ("json", "safetensors"))]
    )


def test_a_published_file_is_private_and_whole(tmp_path):
    Registry(tmp_path).publish(make_scorer())
    for name in ("00000001.json", "00000001.safetensors"):
        status = (tmp_path / "registry" / name).stat()
        assert status.st_mode & 0o777 == 0o600 and status.st_nlink == 1


def test_what_a_registry_is_given_every_version_carries(tmp_path):
    scaling = {"rule": "robust", "center": [0.5], "scale": [2.0]}
    registry = pickle.loads(pickle.dumps(Registry(tmp_path, {"scaling": scaling, "by": "all"})))
    registry.publish(make_scorer(3), metadata={"by": "this one"})
    stored = Registry(tmp_path).load(1).metadata
    assert (stored["scaling"], stored["by"], stored["seed"]) == (scaling, "this one", 3)


@pytest.mark.parametrize("version", [0, -1, 99, 10**8, "1", "../1", True, 1.0, None])
def test_a_version_that_is_not_there_is_rejected(tmp_path, version):
    registry = Registry(tmp_path)
    registry.publish(make_scorer())
    with pytest.raises(ScorerRejected) as error:
        registry.load(version)
    assert error.value.reason in {"missing", "version"}


def test_mixed_up_and_replayed_files_are_rejected(tmp_path):
    registry = Registry(tmp_path)
    for seed in range(2):
        registry.publish(make_scorer(seed))
    folder = tmp_path / "registry"
    first = {s: (folder / f"00000001.{s}").read_bytes() for s in ("json", "safetensors")}
    (folder / "00000002.safetensors").write_bytes(first["safetensors"])
    assert reason_for(registry, 2) == "sha256"
    (folder / "00000002.json").write_bytes(first["json"])
    assert reason_for(registry, 2) == "version"


def reason_for(registry: Registry, version: int) -> str:
    with pytest.raises(ScorerRejected) as error:
        registry.load(version)
    return error.value.reason


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("kind", ["missing", "empty", "directory", "pipe", "symlink", "huge"])
def test_strange_files_are_rejected_and_the_older_version_serves(tmp_path, suffix, kind):
    registry = Registry(tmp_path)
    for seed in range(2):
        registry.publish(make_scorer(seed))
    path = tmp_path / "registry" / f"00000002.{suffix}"
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    assert reason_for(registry, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = registry.latest_verified()
    assert newest is not None and newest[0] == 1


def test_a_corrupt_version_is_skipped_with_one_warning_and_counted(tmp_path):
    registry = Registry(tmp_path)
    for seed in range(3):
        registry.publish(make_scorer(seed))
    path = tmp_path / "registry" / "00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="version 3"):
        newest = registry.latest_verified()
    assert newest is not None and newest[0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.latest_verified()
    assert registry.rejections == Counter(truncated=2)
    # The number stays taken: version 3 is never something else.
    assert registry.publish(make_scorer(9)) == 4


# Fault injection. The n-th system call dies (the process) or fails (an OSError), for every n.

KILLED = """
import json, os, sys
from pathlib import Path
from hotlane import make_scorer, make_windows
from metagrad_filter.registry import Registry

calls, bits = sys.argv[2].split(","), int(sys.argv[3])
windows = make_windows(4)
scorers = {v: make_scorer(v, bits=bits) for v in (1, 2)}
expected = {v: scorer.score(windows).tobytes() for v, scorer in scorers.items()}
n, seen, done = 0, [], False
while not done:
    n += 1
    run_dir = Path(sys.argv[1]) / str(n)
    Registry(run_dir).publish(scorers[1])
    child = os.fork()
    if child == 0:
        left = n
        def dying(call):
            def wrapper(*args, **kwargs):
                global left
                left -= 1
                if left == 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return wrapper
        for name in calls:
            setattr(os, name, dying(getattr(os, name)))
        Registry(run_dir).publish(scorers[2])
        os._exit(0)
    done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    reader = Registry(run_dir)
    version, scorer = reader.latest_verified()
    assert reader.versions() == list(range(1, version + 1)), n
    assert scorer.score(windows).tobytes() == expected[version], n
    folder = run_dir / "registry"
    assert len(list(folder.glob(".tmp-*"))) <= 1, n
    published = reader.publish(make_scorer(3))
    assert published > version and reader.latest() == published, n
    reader.publish(make_scorer(4))
    names = {p.name for p in folder.iterdir()} - {".lock"}
    complete = {f"{v:08d}.{s}" for v in reader.versions() for s in ("json", "safetensors")}
    assert names == complete, (n, names ^ complete)
    seen.append(version)
assert seen == sorted(seen), "once visible, a version stays visible"
print(json.dumps(seen))
"""


@pytest.mark.parametrize("bits", [6, 12, 18])  # payloads of 1 KiB, 17 KiB and 1 MiB
def test_reader_sees_old_or_new_version_wherever_the_publisher_is_killed(tmp_path, bits):
    program = run_program(KILLED, str(tmp_path), ",".join(SYSTEM_CALLS), str(bits))
    output, _ = program.communicate()
    assert program.returncode == 0
    seen = json.loads(output)
    assert set(seen) == {1, 2} and len(seen) > 15


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_publish_fails_typed_and_keeps_earlier_versions_whatever_call_fails(
    tmp_path, monkeypatch, error
):
    for n in range(1, 100):
        run_dir = tmp_path / str(n)
        registry = Registry(run_dir)
        registry.publish(make_scorer(1))
        left = n

        def failing(call):
            def wrapper(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    raise OSError(error, os.strerror(error))
                return call(*args, **kwargs)

            return wrapper

        failed = False
        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "link", "unlink"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                registry.publish(make_scorer(2))
            except PublishFailed as failure:
                failed = True
                assert str(run_dir) in str(failure) and "intact" in str(failure)
        assert registry.load(1).metadata == {"seed": 1}
        newest = registry.latest_verified()
        assert newest is not None and newest[1].metadata == {"seed": newest[0]}
        assert registry.publish(make_scorer(3)) > newest[0]
        if not failed and left > 0:
            assert n > 10
            return
    raise AssertionError("publish never ran to its end")


def test_a_directory_that_cannot_be_written_fails_typed(tmp_path):
    (tmp_path / "registry").write_text("a file")
    with pytest.raises(PublishFailed):
        Registry(tmp_path).publish(make_scorer())
    with pytest.raises(PublishFailed):
        Registry(tmp_path).reject(None, "x")


class Disk:
    """Records what a program does to the files below `root`, and what a power loss leaves of it.

    What was not synced may be there in part: of a file any prefix, of a folder any of the names
    made or removed since, in any combination (as with delayed allocation and unordered metadata).
    """

    def __init__(self, root: Path, monkeypatch):
        self.root = root
        self.events: list[tuple[Any, ...]] = []
        self.durable = {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        self.folders = {str(p) for p in root.rglob("*") if p.is_dir()} | {str(root)}
        names: dict[int, str] = {}
        real = {n: getattr(os, n) for n in ("open", "write", "fsync", "link", "unlink", "mkdir")}

        def opened(path, flags, *rest):
            handle = real["open"](path, flags, *rest)
            names[handle] = str(path)
            if flags & os.O_CREAT:
                self.events.append(("create", str(path)))
            return handle

        def wrote(handle, data):
            count = real["write"](handle, data)
            self.events.append(("write", names[handle], bytes(data[:count])))
            return count

        def synced(handle):
            real["fsync"](handle)
            self.events.append(("sync", names[handle]))

        def named(call):
            def wrapper(*paths):
                real[call](*paths)
                self.events.append((call, *map(str, paths)))

            return wrapper

        for name, call in {"open": opened, "write": wrote, "fsync": synced}.items():
            monkeypatch.setattr(os, name, call)
        for name in ("link", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, named(name))

    def after_power_loss(self, at: int, rng: np.random.Generator) -> dict[str, bytes]:
        """The files there are when the power fails before event number `at`."""
        events = self.events[:at]
        last_sync = {event[1]: n for n, event in enumerate(events) if event[0] == "sync"}
        content = dict(self.durable)
        safe = {path: len(data) for path, data in content.items()}
        file_of = {path: path for path in content}
        entries = {path: path for path in {*content, *self.folders}}
        for n, (what, path, *rest) in enumerate(events):
            if what == "write":
                content[path] += rest[0]
            elif what == "sync":
                safe[path] = len(content.get(path, b""))
            else:
                if what == "create":
                    content.setdefault(path, b"")
                target = rest[0] if what == "link" else path
                file_of[target] = file_of.setdefault(path, path)
                if n < last_sync.get(str(Path(target).parent), -1) or rng.random() < 0.5:
                    if what == "unlink":
                        entries.pop(target, None)
                    else:
                        entries[target] = file_of[target]
        return {
            path: content[file][: int(rng.integers(safe.get(file, 0), len(content[file]) + 1))]
            for path, file in entries.items()
            if file in content
            and all(str(p) in entries for p in Path(path).parents if p.is_relative_to(self.root))
        }


class Files:
    """The files of a disk after a power loss, for reading only."""

    def __init__(self, root: Path, files: dict[str, bytes]):
        self.files = {str(Path(path).relative_to(root)): data for path, data in files.items()}

    def describe(self, key: str = "") -> str:
        return f"after/{key}"

    def read(self, key: str, limit: int) -> bytes:
        if key not in self.files:
            raise FileNotFoundError(key)
        return self.files[key]

    def names(self, folder: str) -> list[str]:
        return [key[len(folder) + 1 :] for key in self.files if key.startswith(folder + "/")]

    def write_once(self, key: str, data: bytes) -> bool:
        return key not in self.files

    def remove(self, key: str) -> None:
        raise AssertionError("a reader removes nothing")

    def stamp(self, folder: str) -> None:
        return None

    def exclusive(self, folder: str):
        raise AssertionError("a reader locks nothing")


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_power_loss_leaves_the_old_or_the_new_version(tmp_path, monkeypatch, earlier):
    for n in range(earlier):
        Registry(tmp_path).publish(make_scorer(n))
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch)
        new = Registry(tmp_path).publish(make_scorer(earlier))
    old = new - 1 or None
    ends, seen = len(disk.events), Counter()
    for seed in range(600):
        rng = np.random.default_rng(seed)
        # One in ten power losses comes after `publish` has returned.
        at = ends if seed % 10 == 0 else int(rng.integers(ends))
        reader = Registry(Files(tmp_path, disk.after_power_loss(at, rng)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.latest_verified()
        version = None if found is None else found[0]
        assert version in (old, new), (seed, at)
        if found is not None:
            assert found[1].metadata == {"seed": found[0] - 1}
        assert at < ends or version == new, (seed, disk.events)
        seen[version] += 1
    assert min(seen[old], seen[new]) > 50


PUBLISHER = """
import sys
from hotlane import make_scorer
from metagrad_filter import registry, store
if sys.argv[3] == "without_locks":
    store.fcntl = None
mine = registry.Registry(sys.argv[1])
start = int(sys.argv[2])
print(*(mine.publish(make_scorer(seed)) for seed in range(start, start + 12)))
"""


@pytest.mark.parametrize("locks", ["with_locks", "without_locks"])
def test_two_publishers_at_once_share_the_numbers(tmp_path, locks):
    programs = [run_program(PUBLISHER, str(tmp_path), s, locks) for s in ("0", "100")]
    published = []
    for program in programs:
        output, _ = program.communicate()
        assert program.returncode == 0
        published.append([int(v) for v in output.split()])
    assert all(versions == sorted(versions) for versions in published)
    assert sorted(published[0] + published[1]) == list(range(1, 25))
    registry = Registry(tmp_path)
    for start, versions in zip((0, 100), published):
        assert [registry.load(v).metadata["seed"] for v in versions] == [*range(start, start + 12)]


def test_locks_are_optional(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "fcntl", None)
    assert Registry(tmp_path).publish(make_scorer()) == 1
