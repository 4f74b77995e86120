"""Builds the custom calls for Hopper, once for each set of sources, and refuses slow machine code.

    path, problem = plugin()        the library, or one line that says why there is none

Needs nvcc (on the PATH, or named by `CUDACXX`) and a checkout of ThunderKittens that
`THUNDERKITTENS_ROOT` names and `kernels/thunderkittens.pin` describes. The library goes to the
user's cache folder under a name that hashes all that it was made from. A build fails where the
compiler spills registers, runs tensor-core instructions one at a time (C7512 and its like) or
ignores how registers are shared between warps (C7508).

Cost: half a minute on one core, the first time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jax

from metagrad_filter.errors import ConfigError

FOLDER = Path(__file__).parent
PIN = FOLDER.parents[1] / "thunderkittens.pin"
SOURCES = ("plugin.cu", "sweep.cuh", "exchange.cuh", "forward.cuh", "pieces.cuh", "tiles.cuh")
ROOT = "THUNDERKITTENS_ROOT"
FLAGS = (
    *("-std=c++20", "-O3", "--use_fast_math", "--expt-relaxed-constexpr"),
    *("--expt-extended-lambda", "-forward-unknown-to-host-compiler", "-Xcompiler=-fPIC"),
    *("-Xcompiler=-fno-strict-aliasing", "-DNDEBUG", "-DKITTENS_HOPPER", "-DKITTENS_SM90"),
    *("-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v,--warn-on-spills"),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel.

    Attributes:
      name: its name, as the object file has it.
      registers: at entry, for each thread.
      stack: bytes of local memory.
      spills: bytes that are stored to and loaded from local memory for want of registers.
    """

    name: str
    registers: int
    stack: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """What a build needs: the compiler, its version, and ThunderKittens' headers."""

    nvcc: str
    release: str
    headers: Path


def toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit | str:
    """What a build needs, or one line that says what is missing."""
    nvcc = environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        return "nvcc is not on the PATH; install CUDA's compiler, or name it with CUDACXX"
    if not environ.get(ROOT):
        return f"{ROOT} is not set; expected a checkout of ThunderKittens at {pinned()['commit']}"
    headers = Path(environ[ROOT]) / "include"
    if not (headers / "kittens.cuh").is_file():
        return f"{ROOT}={environ[ROOT]} holds no include/kittens.cuh; expected ThunderKittens"
    if content_hash(headers) != pinned()["include_sha256"]:
        return (
            f"the headers of {ROOT}={environ[ROOT]} are not those of commit "
            f"{pinned()['commit']}, which the kernels are written for; check that commit out"
        )
    try:
        found = subprocess.run(  # noqa: S603
            [nvcc, "--version"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} --version failed ({error})"
    return Toolkit(nvcc, found.stdout.strip().splitlines()[-1], headers)


def pinned() -> dict[str, str]:
    """The fields of the pin file."""
    lines = [line.split() for line in PIN.read_text().splitlines() if line.strip()]
    return {words[0]: words[1] for words in lines if not words[0].startswith("#")}


def content_hash(folder: Path) -> str:
    """SHA-256 over names and contents of all files below `folder`."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            whole.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where libraries are kept between processes."""
    user = environ.get("METAGRAD_FILTER_CACHE")
    if user:
        return Path(user) / "kernels"
    root = environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "metagrad-filter" / "kernels"


@functools.cache
def plugin() -> tuple[Path | None, str | None]:
    """The library of custom calls, built if need be; or None and the reason."""
    tools = toolkit()
    if isinstance(tools, str):
        return None, tools
    try:
        return build(tools, cache_folder()), None
    except ConfigError as error:
        return None, str(error)


def build(tools: Toolkit, folder: Path) -> Path:
    """Builds the library into `folder`, unless one of the same sources and tools is there.

    Raises:
      ConfigError: it does not compile, or not to what `gate` lets through.
    """
    made_of = [*FLAGS, tools.release, pinned()["include_sha256"], version("jaxlib")]
    made_of += [hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in SOURCES]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    library = folder / f"attention_hopper-{digest}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / library.name
        log = compile_plugin(tools, output)
        gate(log)
        report(library).write_text(log)
        os.replace(output, library)
    return library


def report(library: Path) -> Path:
    """Where the compiler's report on a library lies."""
    return library.with_suffix(".log")


def compile_plugin(tools: Toolkit, output: Path) -> str:
    """Compiles the custom calls to a shared library; returns what the compiler said."""
    command = [tools.nvcc, "-shared", *FLAGS, "-cudart", "static"]
    # The toolkit itself needs no driver library: its two functions are found where there is a GPU.
    command += [f"-I{tools.headers}", f"-I{FOLDER}", "-isystem", jax.ffi.include_dir()]
    command += [str(FOLDER / "plugin.cu"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        lines = [x for x in (done.stdout + done.stderr).splitlines() if "error" in x]
        raise ConfigError(
            f"nvcc could not compile the kernels for Hopper: {(lines or ['it said nothing'])[0]}; "
            "expected CUDA 13.0 with a C++20 compiler."
        )
    return done.stdout + done.stderr


def gate(log: str) -> list[Kernel]:
    """The kernels of a compiler's report, none of which may spill or run serialised.

    Raises:
      ConfigError: one does; the message names it.
    """
    found = kernels(log)
    if not found:
        raise ConfigError("the compiler's report names no kernel; expected one for each variant.")
    spilling = [k.name for k in found if k.spills]
    if spilling:
        raise ConfigError(
            f"the compiler spills registers in {', '.join(spilling)}; expected none: use the "
            "compiler release that the record names."
        )
    if match := re.search(r"\((C75\d\d)\)[^\n]*?(?:function '(\w+)'|$)", log, re.MULTILINE):
        raise ConfigError(
            f"the compiler reports {match[1]} for {match[2] or 'a kernel'}; expected tensor-core "
            "instructions under way together, and registers shared between warps as the kernel "
            "says."
        )
    return found


def kernels(log: str) -> list[Kernel]:
    """What ptxas says of each kernel, in its order."""
    found, name, stack, spills = [], "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name, stack, spills = match[1], 0, 0
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            found.append(Kernel(name, int(match[1]), stack, spills))
            name = ""
    return found
