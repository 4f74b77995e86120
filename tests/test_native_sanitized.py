"""The native cores under AddressSanitizer and UndefinedBehaviorSanitizer, against naive loops.

Every `tests/native/*_fuzz.cpp` is compiled on its own, without Python, and runs some thousand cases
from a fixed seed; `make fuzz` runs more of them. An instruction set that the processor lacks is not
run.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARNESSES = sorted((ROOT / "tests" / "native").glob("*_fuzz.cpp"))
CASES = 4000
FLAGS = [
    "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-ffp-contract=off",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    """A C++ compiler whose sanitizers link and run."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = next((name for name in names if name and shutil.which(name)), None)
    if found is None:
        pytest.skip("no C++ compiler: set CXX, or install one")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = subprocess.run(
        [found, *FLAGS, "probe.cpp", "-o", "probe"], cwd=folder, capture_output=True, text=True
    )
    if probe.returncode or subprocess.run([folder / "probe"]).returncode:
        pytest.skip(f"{found} lacks the address and undefined-behaviour sanitizers")
    return found


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda path: path.stem)
def test_the_core_stays_in_bounds_and_equals_a_naive_loop(harness, compiler, tmp_path):
    program = tmp_path / harness.stem
    command = [compiler, *FLAGS, "-I", ROOT / "kernels" / "scorer", harness, "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([program, str(CASES), "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(CASES) in run.stdout


def test_there_are_harnesses():
    assert "ngram_fuzz" in {path.stem for path in HARNESSES}
