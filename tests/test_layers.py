"""Imports point one way, the hot lane imports no jax, and nothing that is read can run."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In order: a module imports only from those before it (and from itself).
HOT_LANE = [
    "metagrad_filter.errors",
    "metagrad_filter.files",
    "metagrad_filter.windows",
    "metagrad_filter.scorer.features",
    "metagrad_filter.kernels.scorer",
    "metagrad_filter.kernels.scorer.series",
    "metagrad_filter.scorer.scorer",
    "metagrad_filter.scorer.series",
    "metagrad_filter.scorer.artifact",
    "metagrad_filter.selection",
    "metagrad_filter.threshold",
    "metagrad_filter.store",
    "metagrad_filter.spool",
    "metagrad_filter.registry",
    "metagrad_filter.ledger",
    "metagrad_filter.watch",
    "metagrad_filter.counting",
    "metagrad_filter.blockstats",
    "metagrad_filter.monitor.port",
    "metagrad_filter.monitor.sinks",
    "metagrad_filter.decisions",
    "metagrad_filter.blocks",
    "metagrad_filter.online",
    "metagrad_filter.resume",
    "metagrad_filter.adapters.options",
    "metagrad_filter.adapters.sequence",
    "metagrad_filter.adapters.stream",
    "metagrad_filter.transform",
]
COLD = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "tensorstore"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "torch.load", "os.system"}
UNSAFE_CALLS |= {"tempfile.mktemp", "np.load", "numpy.load"}


def path_of(module: str) -> Path:
    parts = module.split(".")
    if parts[:2] in (["metagrad_filter", "kernels"], ["metagrad_filter", "adapters"]):
        parts = parts[1:]
    path = ROOT.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "adapters"):
        parts.insert(0, "metagrad_filter")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    rooms = ("metagrad_filter", "kernels", "adapters")
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those that only a type checker reads."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    for child in ast.iter_child_nodes(node):
        yield from executed(child)


def imports(path: Path) -> set[str]:
    """Full names of what a file imports when it runs, modules and what is taken from them."""
    found: set[str] = set()
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def belongs(name: str, prefixes) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@pytest.mark.parametrize("module", HOT_LANE)
def test_the_hot_lane_imports_no_jax_and_only_what_comes_before_it(module):
    allowed = {*HOT_LANE[: HOT_LANE.index(module) + 1], "metagrad_filter", "metagrad_filter.scorer"}
    for name in imports(path_of(module)):
        assert not belongs(name, COLD), name
        assert not name.startswith("grain._src"), name
        if name.startswith("metagrad_filter"):
            assert belongs(name, allowed - {"metagrad_filter", "metagrad_filter.scorer"}) or (
                name in allowed
            ), name


def test_kernels_and_the_mathematics_do_not_import_what_uses_them():
    rules = {
        "metagrad_filter.kernels.attention": ["proxy", "metagradient", "calibration", "transform"],
        "metagrad_filter.proxy": ["metagradient", "calibration", "transform", "registry"],
        "metagrad_filter.metagradient": ["calibration", "transform", "registry", "scorer"],
        "metagrad_filter.scorer": ["metagradient", "proxy", "calibration", "registry", "transform"],
    }
    for path in sources():
        for room, forbidden in rules.items():
            if belongs(module_of(path), [room]):
                for name in imports(path):
                    assert not belongs(name, [f"metagrad_filter.{f}" for f in forbidden]), (
                        path,
                        name,
                    )


def test_a_fresh_interpreter_filters_without_jax():
    # grain itself may import jax, so transform.py is held to it by its source alone.
    program = f"""
import importlib, json, sys
import metagrad_filter as mgf
for module in {HOT_LANE[:-1]!r}:
    importlib.import_module(module)
mgf.TextWindows, mgf.SeriesWindows, mgf.Scorer, mgf.Registry, mgf.Ledger, mgf.ConfigError
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(output))
    assert not loaded & (COLD | {"grain", "torch", "tensorflow"})


def test_the_package_names_its_exports_and_refuses_others():
    import metagrad_filter as mgf

    for name in ("score_filter", "Scorer", "Registry", "Ledger", "WindowError"):
        assert getattr(mgf, name).__name__ == name and name in dir(mgf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mgf.nothing  # noqa: B018


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_can_run(path):
    tree = ast.parse(path.read_text())
    for name in imports(path):
        assert not belongs(name, UNSAFE_MODULES), name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            allowed = called in {"np.load", "numpy.load"} and not any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                for keyword in node.keywords
            )
            assert called not in UNSAFE_CALLS or allowed, (called, node.lineno)
            # Weights come from safetensors only; remote code is never trusted.
            for keyword in node.keywords:
                assert keyword.arg != "trust_remote_code" or (
                    ast.unparse(keyword.value) == "False"
                ), node.lineno
