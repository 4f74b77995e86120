"""A reader sees a complete version or the previous one, whoever dies while publishing."""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hotlane import make_scorer, make_windows

from metagrad_filter import registry as registry_module
from metagrad_filter.errors import ConfigError, PublishFailed, ScorerRejected
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


def test_versions_grow_and_load_as_published(tmp_path):
    registry = Registry(tmp_path)
    assert (registry.latest(), registry.versions(), registry.latest_verified()) == (None, [], None)
    scorers = [make_scorer(seed) for seed in range(3)]
    assert [registry.publish(s, {"round": i}) for i, s in enumerate(scorers)] == [1, 2, 3]
    assert registry.versions() == [1, 2, 3] and registry.latest() == 3
    windows = make_windows(5)
    for version, scorer in enumerate(scorers, 1):
        loaded = Registry(tmp_path).load(version)
        assert loaded.score(windows).tobytes() == scorer.score(windows).tobytes()
        assert loaded.metadata == {"seed": version - 1, "round": version - 1}
        assert registry.manifest(version)["version"] == version
    newest = registry.latest_verified()
    assert newest is not None and newest[0] == 3
    older = registry.latest_verified(below=3)
    assert older is not None and older[0] == 2
    assert files(tmp_path) == sorted(
        [".lock", *(f"{v:08d}.{s}" for v in (1, 2, 3) for s in ("json", "safetensors"))]
    )


def test_a_published_file_is_private_and_whole(tmp_path):
    Registry(tmp_path).publish(make_scorer())
    for name in ("00000001.json", "00000001.safetensors"):
        status = (tmp_path / "registry" / name).stat()
        assert status.st_mode & 0o777 == 0o600 and status.st_nlink == 1


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


def test_rejected_candidates_leave_a_record(tmp_path):
    registry = Registry(tmp_path)
    registry.reject(None, "no_labels")
    path = registry.reject(make_scorer(5), "gate", {"correlation": 0.1})
    assert path.name == "rejected-2.json"
    record = json.loads(path.read_text())
    assert record == {"reason": "gate", "metadata": {"seed": 5, "correlation": 0.1}}
    assert registry.versions() == []
    with pytest.raises(ConfigError):
        registry.reject(None, "x", {"bad": object()})


# Fault injection. The n-th system call dies (the process) or fails (an OSError), for every n.

KILLED = """
import json, os, sys
from pathlib import Path
from hotlane import make_scorer, make_windows
from metagrad_filter.registry import Registry

calls = sys.argv[2].split(",")
windows = make_windows(4)
expected = {v: make_scorer(v).score(windows).tobytes() for v in (1, 2)}
n, seen, done = 0, [], False
while not done:
    n += 1
    run_dir = Path(sys.argv[1]) / str(n)
    Registry(run_dir).publish(make_scorer(1))
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
        Registry(run_dir).publish(make_scorer(2))
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


def test_reader_sees_old_or_new_version_wherever_the_publisher_is_killed(tmp_path):
    program = run_program(KILLED, str(tmp_path), ",".join(SYSTEM_CALLS))
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


PUBLISHER = """
import sys
from hotlane import make_scorer
from metagrad_filter import registry
if sys.argv[3] == "without_locks":
    registry.fcntl = None
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
    monkeypatch.setattr(registry_module, "fcntl", None)
    assert Registry(tmp_path).publish(make_scorer()) == 1
