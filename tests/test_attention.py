"""Attention: every derivative against the whole softmax in float64, features, precision, memory."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    attend,
    documents,
    example,
    naive,
    quick_jit,
    tiny,
    transformations,
    worst,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import attention, reference  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.chunked import _Group  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.parts import chosen  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import Pattern  # pyright: ignore[reportMissingImports]

# Two key heads for four query heads, a window, packed documents, and tiles that do not divide 20.
TRAINED = "gradient through training"
EVERYTHING = {"window": 9, "segment_ids": documents(2, 20), "scale": 0.6}
FEATURES = {
    "causal": ({}, {}),
    "everything": ({"key_heads": 2}, EVERYTHING),
    "full": ({}, {"causal": False}),
    "window both ways": ({"key_heads": 1}, {"causal": False, "window": 3}),
    "documents both ways": ({}, {"causal": False, "segment_ids": documents(2, 20, seed=1)}),
    "more keys": ({"keys": 29}, {"causal": False}),
    "more keys, causal": ({"keys": 29, "key_heads": 2}, {}),
    "more queries": ({"keys": 7}, {}),
    "queries that see nothing": ({"keys": 7, "key_heads": 1}, {"causal": False, "window": 4}),
}


def difference(name, implementation, shape, options, size=(2, 20, 4, 4)):
    """Of one transformation between an implementation and the whole softmax, in float64."""
    with jax.enable_x64(True):
        x, along = (example(size, **shape, seed=s) for s in (0, 1))
        found, expected = (
            quick_jit(transformations(f)[name])(x, along)
            for f in (attend(implementation, **options), functools.partial(naive, **options))
        )
        return worst(found, expected)


# Those that the others do not hold as a part.
TOLD = (
    "value",
    "reverse over reverse",
    "forward over reverse",
    "reverse over forward",
    "vmap of operands",
    "checkpoint",
    TRAINED,
)


def test_every_derivative_is_that_of_the_whole_softmax():
    def everything(f):
        # The windows of the training have no ids of their own.
        plain = {"window": 9, "scale": 0.6}
        programs = transformations(functools.partial(f, **EVERYTHING))
        programs |= {TRAINED: transformations(functools.partial(f, **plain))[TRAINED]}
        return quick_jit(lambda *y: {name: programs[name](*y) for name in TOLD})

    with jax.enable_x64(True):
        x, along = (example(key_heads=2, seed=s) for s in (0, 1))
        found, expected = (everything(f)(x, along) for f in (attend("reference"), naive))
        errors = {name: worst(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("name", ["reverse over reverse", "forward over reverse"])
def test_second_order_in_tiles_is_that_of_the_whole_softmax(name):
    assert difference(name, "tiny", *FEATURES["everything"]) <= 1e-12


@pytest.mark.parametrize("features", sorted(set(FEATURES) - {"everything", "causal"}))
def test_every_feature_is_that_of_the_whole_softmax(features):
    assert difference("grad", "reference", *FEATURES[features]) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "chunked", "tiny"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", transformations(naive))
def test_every_derivative_with_every_feature(name, features, implementation):
    if name == TRAINED and "segment_ids" in FEATURES[features][1]:
        return  # its windows are mapped over one by one and have no ids of their own
    assert difference(name, implementation, *FEATURES[features]) <= 1e-12


@pytest.mark.slow
def test_third_derivatives_are_right_too():
    with jax.enable_x64(True):
        x, along = (example((1, 10, 2, 3), seed=s) for s in (0, 1))
        options = {"window": 4}

        def third(f):
            twice = transformations(f)["forward over forward"]
            return quick_jit(jax.grad(lambda x: twice(x, along)))(x)

        assert worst(
            third(attend("tiny", **options)), third(functools.partial(naive, **options))
        ) <= (1e-12)


# Loops against the specification: any shape, any pattern.


@st.composite
def problems(draw):
    name = draw(st.sampled_from(sorted(OPERANDS)))
    key_heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)]))
    length = draw(st.integers(1, 35))
    packed = draw(st.booleans())
    keys = length if packed else draw(st.integers(1, 35))
    side = st.none() | st.integers(0, 40)
    left = draw(side)
    right = draw(side)
    shape = (draw(st.integers(1, 3)), length, key_heads * groups, draw(st.sampled_from([1, 8])))
    kinds, outputs = OPERANDS[name]
    # One operand that the others are linear with, and one output, are there at least.
    given = [True] * min(len(kinds), 5) + [draw(st.booleans()) for _ in kinds[5:]]
    wanted = [draw(st.booleans()) for _ in outputs[1:]]
    parts = tuple(given), (True, *wanted) if name == "fwd" else (not any(wanted), *wanted)
    pattern = Pattern(0.7, left, right)
    return name, shape, keys, key_heads, pattern, packed, draw(st.integers(0, 99)), parts


def loops_differ(problem):
    """Asserts that what the loops leave out as zero, or as nobody's, changes nothing else."""
    name, shape, keys, key_heads, pattern, packed, seed, (given, wanted) = problem
    rng = np.random.default_rng(seed)
    sizes = {
        "q": shape,
        "k": (shape[0], keys, key_heads, shape[3]),
        "r": (shape[0], shape[2], shape[1]),
    }
    operands = [rng.normal(size=sizes[kind]) for kind in OPERANDS[name][0]]
    # Ids in any order: the tiles of a document need not be neighbours.
    ids = [rng.integers(0, 3, shape[:2]).astype(np.int32)] if packed else []

    def both(operands, ids):
        if name != "fwd":
            operands[3] = reference.run("fwd", pattern, *operands[:3], *ids)[1]
        some = [x if there else None for there, x in zip(given, operands)]
        every = [x if there else 0 * x for there, x in zip(given, operands)]
        found = tiny(name, pattern, *some, *ids, wanted=wanted)
        return found, chosen(wanted, reference.run(name, pattern, *every, *ids))

    with jax.enable_x64(True):
        found, expected = quick_jit(both)(operands, ids)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


@settings(max_examples=4)
@given(problems())
def test_the_loops_compute_what_the_reference_computes(problem):
    loops_differ(problem)


@pytest.mark.slow
@settings(max_examples=250)
@given(problems())
def test_the_loops_compute_what_the_reference_computes_at_length(problem):
    loops_differ(problem)


@settings(max_examples=15)
@given(
    st.none() | st.integers(0, 30),
    st.none() | st.integers(0, 30),
    st.sampled_from([(5, 8), (3, 3)]),
    st.sampled_from([(4, 8), (7, 2)]),
)
def test_a_tile_is_needed_exactly_where_it_holds_a_visible_pair(left, right, queries, keys):
    pattern = Pattern(1.0, left, right)
    i, j = np.arange(queries[0] * queries[1])[:, None], np.arange(keys[0] * keys[1])[None]
    seen = pattern.visible(jnp.asarray(i), jnp.asarray(j), j.size)
    seen = np.ones((i.size, j.size), bool) if seen is None else np.asarray(seen)
    expected = seen.reshape(*queries, *keys).any(axis=(1, 3))
    np.testing.assert_array_equal(pattern.tiles(queries, keys), expected)


def test_tiles_of_other_documents_are_skipped():
    q, k, v = example((1, 64, 1, 4), dtype=np.float32)
    ids = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 16)[None]
    group = _Group("fwd", Pattern(1.0, None, 0), [q, k, v, ids], (True, True), (8, 8), (8, 8))
    laid = [group._lay_ids(8, 8, ids)] * 2
    starts, stops = group._bounds(laid)
    np.testing.assert_array_equal(starts, [0, 0, 2, 2, 4, 4, 6, 6])
    np.testing.assert_array_equal(stops, [1, 2, 3, 4, 5, 6, 7, 8])


# What the graph holds.


def passes(jaxpr):
    """How often each primitive occurs, in a jaxpr and in those inside it."""
    found = collections.Counter()
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("attention_"):
            found[equation.primitive.name.removeprefix("attention_")] += 1
        for x in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                found += passes(x)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("value", {"fwd": 1}),
        ("grad", {"fwd": 1, "bwd": 1}),
        ("jvp", {"fwd": 1, "lin": 1}),
        ("reverse over reverse", {"fwd": 1, "bwd": 2, "adj": 1}),
        ("forward over reverse", {"fwd": 1, "lin": 1, "bwd": 1, "hess": 1}),
        ("reverse over forward", {"fwd": 1, "lin": 1, "bwd": 1, "adj": 1}),
        ("vmap of tangents", {"fwd": 1, "lin": 1, "bwd": 1, "hess": 1}),
    ],
)
def test_each_derivative_takes_the_passes_of_its_closed_form(name, expected):
    x, along = (example(dtype=np.float32, seed=s) for s in (0, 1))
    run = jax.jit(transformations(attend("chunked"))[name])
    assert passes(jax.make_jaxpr(run)(x, along)) == expected


def some_constant(f):
    """Second derivatives in which tangents are zero and cotangents are nobody's."""

    def linear(q, k, v):
        return jnp.sum(f(q, k, v) * jnp.cos(jnp.arange(q.shape[-1])))

    def curve(x, along, moving):
        def total(*some):
            inputs = list(x)
            for i, y in zip(moving, some):
                inputs[i] = y
            return linear(*inputs)

        inputs, tangents = ([y[i] for i in moving] for y in (x, along))
        gradient = jax.grad(total, tuple(range(len(moving))))
        slope = lambda *y: sum(jnp.vdot(g, t) for g, t in zip(gradient(*y), tangents))  # noqa: E731
        forward = jax.jvp(gradient, inputs, tangents)[1]
        return forward, jax.grad(slope, tuple(range(len(moving))))(*inputs)

    return lambda x, along: [curve(x, along, moving) for moving in ((0,), (1, 2), (2,))]


def test_derivatives_in_some_operands_are_those_of_the_whole_softmax():
    with jax.enable_x64(True):
        x, along = (example((1, 12, 2, 3), key_heads=1, seed=s) for s in (0, 1))
        found, expected = (
            quick_jit(some_constant(f))(x, along) for f in (attend("reference"), naive)
        )
        # Attention is linear in v: those second derivatives are 0 exactly.
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_what_is_zero_and_what_nobody_asks_for_takes_no_products():
    def products(name, absent=(), wanted=None):
        """Of S S_k d multiplications and additions, in the compiled program."""
        shape = (1, 64, 1, 32)
        sizes = {"q": shape, "k": shape, "r": (1, 1, 64)}
        arrays = [jax.ShapeDtypeStruct(sizes[x], jnp.float32) for x in OPERANDS[name][0]]

        def program(*operands):
            operands = [None if i in absent else x for i, x in enumerate(operands)]
            return reference.run(name, Pattern(1.0, None, 0), *operands, wanted=wanted)

        cost = quick_jit(program).lower(*arrays).compile().cost_analysis()
        assert cost is not None
        return round(cost["flops"] / (2 * 64 * 64 * 32))

    tdo, cotangent_of_q, only_q = (10,), (6,), (True, False, False)
    assert products("hess") - products("hess", tdo) == 2
    assert products("hess", (7, 8, 9, 10, 11)) <= products("hess") - 5
    assert products("hess", wanted=only_q) == products("hess") - 4
    assert products("adj") == 12 and products("adj", cotangent_of_q) == 10
    assert products("adj", wanted=(True,) * 4 + (False, True)) == 10


@pytest.mark.parametrize(
    "name",
    ["reverse over reverse", pytest.param("forward over reverse", marks=pytest.mark.slow)],
)
def test_compiled_memory_is_linear_in_the_sequence(name):
    x, along = (example((1, 4096, 4, 16), dtype=np.float32, seed=s) for s in (0, 1))
    compiled = quick_jit(transformations(attend("chunked"))[name]).lower(x, along).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # In arrays like q, of which the scores of 4096 positions alone would be 256.
    assert memory.temp_size_in_bytes / x[0].nbytes <= 14


# Precision.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_operands_keep_their_dtype_and_float32_statistics(dtype):
    x = example((1, 40, 2, 8), dtype=dtype)
    along = example((1, 40, 2, 8), dtype=dtype, seed=1)
    found = quick_jit(transformations(attend("tiny"))["grad"])(x, along)
    assert {str(y.dtype) for y in jax.tree.leaves(found)} == {dtype}
    wide = [tuple(y.astype(jnp.float32) for y in z) for z in (x, along)]
    expected = quick_jit(transformations(naive)["grad"])(*wide)
    assert worst(found, expected) <= {"bfloat16": 3e-2, "float16": 4e-3}[dtype]
    jaxpr = jax.make_jaxpr(attend("tiny"))(*x)
    norm = next(e for e in jaxpr.eqns if e.primitive.name == "attention_fwd").outvars[1]
    assert str(norm.aval.dtype) == "float32"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_large_mean_of_keys_and_values_costs_no_precision():
    x, along = (example((1, 64, 2, 8), dtype=np.float32, seed=s) for s in (0, 1))
    x = tuple(y.astype(jnp.bfloat16) for y in (x[0], x[1] + 4, x[2] + 4))
    along = tuple(y.astype(jnp.bfloat16) for y in along)
    name = "reverse over reverse"
    found = quick_jit(transformations(attend("chunked"))[name])(x, along)
    wide = [tuple(y.astype(jnp.float32) for y in z) for z in (x, along)]
    expected = quick_jit(transformations(naive)[name])(*wide)
    for a, b in zip(found, expected, strict=True):
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error <= 2e-2, error


def test_bfloat16_queries_that_see_nothing_give_zero():
    q, k, v = example((1, 12, 1, 4), keys=3, dtype=np.float32)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v + 9))
    o = attention(q, k, v, causal=False, window=2)
    assert not np.asarray(o[:, 5:], np.float32).any()
    assert (np.asarray(o[:, :5], np.float32) > 4).all()


# The interface.


def test_the_default_is_chunked_and_names_choose():
    x = example((1, 200, 1, 4), dtype=np.float32)

    def program(implementation):
        return jax.jit(attend(implementation)).lower(*x).as_text()

    assert program(None) == program("chunked") != program("reference")


def test_numpy_arrays_and_eager_calls_work():
    q, k, v = (np.asarray(x) for x in example((1, 5, 2, 4), dtype=np.float32))
    expected, gradients = jax.jit(lambda q: jax.value_and_grad(lambda q: naive(q, k, v).sum())(q))(
        q
    )
    found, slope = jax.value_and_grad(lambda q: attention(q, k, v).sum())(q)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, gradients, rtol=1e-4, atol=1e-6)


Q = jnp.ones((2, 6, 4, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((6, 4, 8))}, r"q \(6, 4, 8\), k .* do not fit"),
        ({"v": jnp.ones((2, 5, 4, 8))}, r"v \(2, 5, 4, 8\) do not fit"),
        ({"q": jnp.ones((1, 6, 4, 8))}, r"q \(1, 6, 4, 8\).* do not fit"),
        ({"q": jnp.ones((2, 6, 4, 9))}, r"q \(2, 6, 4, 9\).* do not fit"),
        ({"q": jnp.ones((2, 0, 4, 8))}, r"q \(2, 0, 4, 8\).* hold nothing"),
        ({"q": jnp.ones((2, 6, 6, 8))}, "q has 6 heads and k has 4"),
        ({"q": Q.astype(jnp.bfloat16)}, "dtypes bfloat16, float32, float32"),
        ({x: Q.astype(jnp.int32) for x in "qkv"}, "dtypes int32, int32, int32"),
        ({"causal": 1}, "causal=1; expected True or False"),
        ({"window": -1}, "window=-1; expected an int of at least 0"),
        ({"window": True}, "window=True"),
        ({"window": 2.0}, "window=2.0"),
        ({"scale": float("nan")}, "scale=nan; expected a finite number"),
        ({"scale": jnp.ones(())}, "multiply q by what is an array"),
        ({"segment_ids": jnp.zeros((2, 5), jnp.int32)}, r"shape \(2, 5\); .* shape \(2, 6\)"),
        ({"segment_ids": jnp.zeros((2, 6))}, "segment_ids are float32"),
        (
            {"q": jnp.ones((2, 5, 4, 8)), "segment_ids": jnp.zeros((2, 5), jnp.int32)},
            "5 queries and 6 keys",
        ),
        ({"implementation": "flash"}, "implementation='flash' cannot run: there is none"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(changes, message):
    arguments = {"q": Q, "k": Q, "v": Q} | changes
    with pytest.raises(ConfigError, match=message) as caught:
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
