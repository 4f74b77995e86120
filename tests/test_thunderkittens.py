"""The Hopper kernels of attention: their own sources on an emulated GPU, their build, their calls.

`tests/native/hopper` is a CPU's version of what the kernels use of CUDA and ThunderKittens: a block
is 384 fibers in a permuted order, shared memory starts as NaN, copies and barriers are as on
Hopper, and a product's destination is NaN until it is waited for. The custom calls are compiled
against it and run as XLA calls on the CPU. What only a GPU can show is not tested here.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents, naive
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import (  # pyright: ignore[reportMissingImports]
    attention,
    reference,
    thunderkittens,
)
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.implementations import (  # pyright: ignore[reportMissingImports]
    IMPLEMENTATIONS,
    Implementation,
    choose,
)
from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.thunderkittens import (  # pyright: ignore[reportMissingImports]
    binding,
    building,
)

ROOT = Path(__file__).parent.parent
HOPPER = ROOT / "tests" / "native" / "hopper"
THUNDERKITTENS = os.environ.get(building.ROOT) or str(ROOT / "build" / "thunderkittens")


@pytest.fixture(scope="module")
def emulated():
    """The custom calls on this CPU, compiled once for each set of sources."""
    compiler = next((x for x in (os.environ.get("CXX"), "g++") if x and shutil.which(x)), None)
    if compiler is None:
        pytest.skip("no g++: set CXX, or install one with C++20")
    sources = [building.FOLDER / name for name in building.SOURCES] + sorted(HOPPER.iterdir())
    made_of = [x.read_bytes() for x in sources] + [jax.__version__.encode()]
    digest = hashlib.sha256(b"\n".join(made_of)).hexdigest()[:16]
    library = ROOT / "build" / "hopper" / f"emulated-{digest}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        scratch = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall"]
        command += ["-Wno-unknown-pragmas", f"-I{HOPPER}", f"-I{building.FOLDER}"]
        command += ["-isystem", jax.ffi.include_dir(), building.FOLDER / "plugin.cu"]
        done = subprocess.run([*command, "-o", scratch], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(scratch, library)
    # Its calls have the names of the real ones, on another platform.
    binding.register(binding.load(library), "cpu")
    IMPLEMENTATIONS.setdefault("emulated", Implementation(binding.run, binding.run))
    fused = functools.partial(binding.run, fused=True)
    IMPLEMENTATIONS.setdefault("emulated_fused", Implementation(fused, fused))


def operands(name, shape, keys, key_heads, pattern, ids, seed=0):
    """Random operands of a primitive, with the statistics of the forward pass."""
    rng = np.random.default_rng(seed)
    batch, _, _, width = shape
    shapes = {"q": shape, "k": (batch, keys, key_heads, width)}

    def drawn(kind):
        return jnp.asarray(rng.normal(size=shapes[kind]), jnp.bfloat16)

    made = [drawn("q"), drawn("k"), drawn("k")]
    if name != "fwd":
        norm = whole("fwd", pattern, made, ids)[1]
        rows = [norm, *(jnp.asarray(rng.normal(size=norm.shape), jnp.float32) for _ in range(3))]
        made += [rows.pop(0) if kind == "r" else drawn(kind) for kind in OPERANDS[name][0][3:]]
    return made


def whole(name, pattern, made, ids):
    wide = [x.astype(jnp.float32) for x in made]
    return reference.run(name, pattern, *wide, *ids)


def errors(found, expected):
    """Relative error of each output, in the norm over all entries; infinite entries must agree."""
    out = []
    for x, y in zip(found, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        finite = np.isfinite(y)
        assert np.array_equal(np.isfinite(x), finite)
        assert np.array_equal(x[~finite], y[~finite])
        difference = np.linalg.norm(x[finite] - y[finite])
        out.append(difference / max(np.linalg.norm(y[finite]), 1e-30))
    return out


def compared(name, shape, *, keys=None, key_heads=None, pattern=None, ids=(), seed=0, fused=False):
    pattern = pattern or Pattern(shape[-1] ** -0.5, None, 0)
    keys, key_heads = keys or shape[1], key_heads or shape[2]
    made = operands(name, shape, keys, key_heads, pattern, ids, seed)
    found = jax.jit(functools.partial(binding.run, name, pattern, fused=fused))(*made, *ids)
    return errors(found, whole(name, pattern, made, ids))


FEATURES = {
    "causal, a length that fills no tile": {"shape": (1, 70, 2, 64), "key_heads": 1},
    "packed documents in a window": {
        "shape": (1, 140, 2, 64),
        "key_heads": 1,
        "pattern": Pattern(0.125, 50, 0),
        "ids": (documents(1, 140),),
    },
    "more keys, all seen": {
        "shape": (1, 65, 2, 64),
        "keys": 131,
        "pattern": Pattern(0.3, None, None),
    },
    "queries that see nothing": {
        "shape": (1, 150, 1, 64),
        "keys": 40,
        "pattern": Pattern(-0.1, 10, 5),
    },
}


@pytest.mark.parametrize("features", sorted(FEATURES))
@pytest.mark.parametrize("name", binding.CALLS)
def test_every_call_is_the_whole_softmax_up_to_bfloat16(emulated, name, features):
    assert max(compared(name, **FEATURES[features])) <= 5e-3


@pytest.mark.parametrize("features", sorted(FEATURES))
@pytest.mark.parametrize("name", binding.FUSED)
def test_fused_calls_are_the_same_in_memory_that_they_clear_first(emulated, name, features):
    assert max(compared(name, **FEATURES[features], fused=True)) <= 5e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", binding.FUSED)
def test_keys_beyond_the_end_weigh_nothing_where_all_scores_are_low(emulated, name, fused):
    # exp(0 - L) overflows: times the zeros that are read beyond the end it would be NaN.
    pattern = Pattern(0.125, None, None)
    made = operands(name, (1, 65, 1, 64), 40, 1, pattern, ())
    made[0], made[1] = abs(made[0]) + 4, -abs(made[1]) - 4
    made[3] = whole("fwd", pattern, made[:3], ())[1]
    assert float(made[3].max()) < -100
    found = jax.jit(functools.partial(binding.run, name, pattern, fused=fused))(*made)
    assert max(errors(found, whole(name, pattern, made, ()))) <= 2e-2


@pytest.mark.parametrize("name", binding.CALLS)
def test_wide_heads_too(emulated, name):
    ids = (documents(1, 70, seed=1),)
    pattern = Pattern(0.1, None, None)
    assert max(compared(name, (1, 70, 1, 96), pattern=pattern, ids=ids)) <= 5e-3


@pytest.mark.slow
@settings(max_examples=25)
@given(
    name=st.sampled_from(binding.CALLS),
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 200, 2, 200, 2))),
    sides=st.tuples(*[st.none() | st.integers(0, 200)] * 2),
    packed=st.booleans(),
    width=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
    fused=st.booleans(),
)
@example("hess", (1, 1, 1, 1, 1), (0, 0), True, 64, 0, False)
@example("hess", (1, 1, 1, 1, 1), (0, 0), True, 64, 0, True)
def test_any_shape_and_band(emulated, name, sizes, sides, packed, width, seed, fused):
    batch, length, key_heads, keys, groups = sizes
    ids = (documents(batch, length, seed),) if packed else ()
    found = compared(
        name,
        (batch, length, key_heads * groups, width),
        keys=length if packed else keys,
        key_heads=key_heads,
        pattern=Pattern(width**-0.5, *sides),
        ids=ids,
        seed=seed,
        fused=fused and width <= 64,
    )
    assert max(found) <= 2e-2  # of few entries, which may cancel


@pytest.mark.parametrize("implementation", ["emulated", "emulated_fused"])
def test_a_second_derivative_through_the_calls(emulated, implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 70, n, 64)), jnp.bfloat16) for n in (2, 1, 1))

    def product(attend):
        """The Hessian of a sum of sines of outputs, times a vector."""

        def total(*x):
            return jnp.sum(jnp.sin(attend(*x).astype(jnp.float32)))

        def slope(*x):
            found = jax.grad(total, (0, 1, 2))(*x)
            return sum(jnp.vdot(a.astype(jnp.float32), jnp.cos(a)) for a in found)

        return jax.jit(jax.grad(slope, (0, 1, 2)))

    found = product(functools.partial(attention, implementation=implementation))(q, k, v)
    expected = product(naive)(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert max(errors(found, expected)) <= 2e-2


@pytest.mark.parametrize(
    ("heads", "dtype", "width", "message"),
    [
        (3, jnp.bfloat16, 64, "attention on Hopper: q and k do not fit"),
        (2, jnp.bfloat16, 32, "d 64 or 128"),
        (2, jnp.float32, 64, "Wrong buffer dtype"),
    ],
)
def test_a_call_checks_its_buffers(emulated, heads, dtype, width, message):
    q, k = jnp.zeros((1, 8, heads, width), dtype), jnp.zeros((1, 8, 2, width), dtype)
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((1, heads, 8), jnp.float32),
    )
    call = jax.ffi.ffi_call(binding.target("fwd"), results)
    static = {"scale": np.float32(1), **dict.fromkeys(("left", "right", "segmented"), np.int64(0))}
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(q, k, k, *binding._no_tables(), **static))


def lowered(monkeypatch, program, *shapes, platform="cuda"):
    monkeypatch.setenv(binding.SWITCH, "elsewhere")
    like = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return jax.jit(program).trace(*like).lower(lowering_platforms=(platform,)).as_text()


def programs(implementation="thunderkittens"):
    attend = functools.partial(attention, implementation=implementation)

    def total(*x):
        return jnp.sum(jnp.sin(attend(*x).astype(jnp.float32)))

    gradient = jax.grad(total, (0, 1, 2))

    def slope(*x):
        return sum(jnp.vdot(a, a).astype(jnp.float32) for a in gradient(*x))

    return {
        "value": (attend, {"fwd"}),
        "gradient": (gradient, {"fwd", "bwd"}),
        "tangent": (lambda *x: jax.jvp(attend, x, x), {"fwd", "lin"}),
        "reverse over reverse": (jax.grad(slope, (0, 1, 2)), {"fwd", "bwd", "adj"}),
        "forward over reverse": (lambda *x: jax.jvp(gradient, x, x), {"fwd", "lin", "bwd", "hess"}),
    }


@pytest.mark.parametrize("name", sorted(programs()))
def test_programs_for_a_gpu_hold_the_custom_calls(monkeypatch, name):
    program, expected = programs()[name]
    text = lowered(monkeypatch, program, (2, 33, 4, 64), (2, 33, 2, 64), (2, 33, 2, 64))
    assert set(re.findall(r"custom_call @attention_hopper_(\w+)\(", text)) == expected
    assert "exponential" not in text


def test_a_fused_program_holds_the_fused_custom_calls(monkeypatch):
    program, _ = programs("thunderkittens_fused")["reverse over reverse"]
    text = lowered(monkeypatch, program, (2, 33, 4, 64), (2, 33, 2, 64), (2, 33, 2, 64))
    expected = {"fwd", "bwd_fused", "adj_fused"}
    assert set(re.findall(r"custom_call @attention_hopper_(\w+)\(", text)) == expected


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_dump_to=x --xla_gpu_exclude_nondeterministic_ops", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
        ("", False),
    ],
)
def test_fused_sums_are_refused_where_xla_is_told_to_be_deterministic(monkeypatch, flags, refused):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv(binding.SWITCH, "elsewhere")
    assert choose("thunderkittens") == "thunderkittens"
    if refused:
        with pytest.raises(ConfigError, match=r"XLA_FLAGS holds --xla_gpu_\w+, .* take the flag"):
            choose("thunderkittens_fused")
    else:
        assert choose("thunderkittens_fused") == "thunderkittens_fused"


def test_a_program_for_the_cpu_says_that_it_has_none(monkeypatch):
    with pytest.raises(ConfigError, match="computation is for a CPU, and this needs a Hopper GPU"):
        lowered(monkeypatch, programs()["value"][0], *[(1, 8, 2, 64)] * 3, platform="cpu")


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [(jnp.float32, 64, "the operands are float32"), (jnp.bfloat16, 160, "head dimension is 160")],
)
def test_operands_that_do_not_fit_are_refused(dtype, width, message):
    x = jnp.zeros((1, 4, 1, width), dtype)
    with pytest.raises(ConfigError, match=message):
        binding.run("fwd", Pattern(1.0), x, x, x)


def test_fused_calls_refuse_wider_heads():
    x = jnp.zeros((1, 4, 1, 128), jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"'thunderkittens_fused' .* is 128, .* at most 64"):
        binding.run("fwd", Pattern(1.0), x, x, x, fused=True)


def test_without_a_hopper_gpu_its_name_is_refused_and_nothing_else_picks_it(monkeypatch):
    x = jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(ConfigError, match="'thunderkittens' cannot run: no ThunderKittens kernels"):
        attention(x, x, x, implementation="thunderkittens")
    monkeypatch.setenv(binding.SWITCH, "default")
    assert choose(None, x) == choose(None)
    assert thunderkittens.reason() is not None


def test_what_a_build_misses_is_said_in_one_line(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0\n")
    nvcc.chmod(0o755)
    assert "THUNDERKITTENS_ROOT is not set" in str(building.toolkit({"CUDACXX": str(nvcc)}))
    environ = {"CUDACXX": str(nvcc), building.ROOT: str(tmp_path)}
    assert "holds no include/kittens.cuh" in str(building.toolkit(environ))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "kittens.cuh").write_text("// another release\n")
    assert f"not those of commit {building.pinned()['commit']}" in str(building.toolkit(environ))


def test_a_hash_of_headers_notices_names_and_contents(tmp_path):
    hashes = set()
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        folder = tmp_path / str(len(hashes))
        folder.mkdir()
        (folder / name).write_text(text)
        hashes.add(building.content_hash(folder))
    assert len(hashes) == 3


GOOD = """ptxas info    : Compiling entry function '_Zadj' for 'sm_90a'
ptxas info    : Function properties for _Zadj
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1104 bytes smem
"""


def test_the_gate_reads_the_compilers_report():
    assert building.gate(GOOD) == [building.Kernel("_Zadj", registers=168, stack=0, spills=0)]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (GOOD.replace("0 bytes spill loads", "4 bytes spill loads"), "spills registers in _Zadj"),
        (
            "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are "
            f"serialized due to insufficient register resources for the function '_Zadj'\n{GOOD}",
            "C7512 for _Zadj",
        ),
        (
            f"ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored\n{GOOD}",
            "C7508",
        ),
        ("nvcc warning : nothing was compiled", "names no kernel"),
    ],
)
def test_the_gate_refuses(log, message):
    with pytest.raises(ConfigError, match=message):
        building.gate(log)


@pytest.mark.slow
def test_the_plugin_builds_under_the_gate_loads_and_has_its_symbols():
    tools = building.toolkit({**os.environ, building.ROOT: THUNDERKITTENS})
    if isinstance(tools, str):
        pytest.skip(tools)
    library = building.build(tools, building.cache_folder())
    assert building.build(tools, building.cache_folder()) == library
    log = building.report(library).read_text()
    assert len(building.gate(log)) == 19
    loaded = binding.load(library)
    for name in binding.targets():
        assert getattr(loaded, name)
