"""`implementation="pallas"`: the formulas in programs of a GPU, written in Pallas for Triton.

Answers "what runs on a GPU that has no kernels of its own here?". Two sweeps compute a primitive:
in one, a program holds a tile of queries and passes over the keys that they see, which sums the row
outputs; in the other it holds a tile of keys and passes over the queries. No two programs write to
the same place, so results are deterministic. Inputs and outputs as in `primitives.py`, in their
layout: nothing is transposed; only sizes that are no multiple of a tile are padded.

Cost: the products of `formulas` for each tile with a visible pair, once for each sweep; memory
beyond operands and outputs: two numbers for each tile of queries and of keys.

16-bit operands are multiplied as they are; products of float32 have the precision that jax's
`default_matmul_precision` names, TF32 where it names none. The programs have been run in
interpretation and compiled for sm_90a; no GPU has run or timed them. jax 0.11 announces the end of
Pallas for Triton; until then it lowers the same programs with a warning.

References:
  Dao, 2024, https://arxiv.org/abs/2307.08691, section 3.2 (which program holds what).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from metagrad_filter.errors import ConfigError
from metagrad_filter.kernels.attention import (  # pyright: ignore[reportMissingImports]
    _jax,
    formulas,
    parts,
)
from metagrad_filter.kernels.attention.formulas import OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import Pattern, both  # pyright: ignore[reportMissingImports]


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a sweep is divided.

    Attributes:
      held: positions that a program holds, a power of 2 of at least 16.
      passed: positions that it passes over at a time, likewise.
      warps: warps of a program.
      stages: tiles in flight.
    """

    held: int
    passed: int
    warps: int
    stages: int


SMALLEST = 16  # what a matrix unit multiplies at least
WIDEST = 128

# By whether operands have 16 bits and whether heads are wider than 64; a name, or the rest. As far
# as registers reach: compiled for sm_90a none of the 16-bit programs spills, and all use wgmma.
_REST = ""
LAUNCHES = {
    (True, False): {
        "fwd": Launch(held=128, passed=64, warps=4, stages=2),
        "bwd": Launch(held=64, passed=64, warps=4, stages=2),
        _REST: Launch(held=64, passed=32, warps=4, stages=2),
    },
    (True, True): {
        "fwd": Launch(held=128, passed=64, warps=8, stages=2),
        "bwd": Launch(held=64, passed=64, warps=8, stages=2),
        _REST: Launch(held=64, passed=16, warps=8, stages=2),
    },
    (False, False): {_REST: Launch(held=32, passed=32, warps=4, stages=2)},
    (False, True): {_REST: Launch(held=32, passed=16, warps=8, stages=2)},
}


def launch_of(name: str, q: jax.Array) -> Launch:
    """How both sweeps of a primitive are divided for operands like `q`."""
    found = LAUNCHES[q.dtype.itemsize == 2, q.shape[-1] > 64]
    return found.get(name, found[_REST])


def run(
    name: str,
    pattern: Pattern,
    *operands: Any,
    wanted: Sequence[bool] | None = None,
    launch: Launch | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Computes primitive `name` with float32 sums.

    Args:
      name: of `formulas.OPERANDS`.
      pattern: which scores there are.
      *operands: its operands, None for those that are zero; segment ids may follow.
      wanted: which outputs to return, all by default.
      launch: how both sweeps are divided, `launch_of` by default.
      interpret: whether jax runs the programs one after the other, on any device.

    Raises:
      ConfigError: the operands are float64, or their heads are wider than 128 (where interpreted,
        neither).
    """
    q = operands[0]
    if not interpret and (q.dtype == jnp.float64 or q.shape[-1] > WIDEST):
        raise ConfigError(
            f"implementation='pallas' cannot run: q is {q.dtype} with heads of {q.shape[-1]}; "
            f"expected at most float32 and {WIDEST}: name another implementation."
        )
    wanted = parts.everything(name) if wanted is None else tuple(wanted)
    launch = launch or launch_of(name, q)
    results: dict[int, jax.Array] = {}
    for by_rows in (True, False):
        mine = [
            i for i, kind in enumerate(OPERANDS[name][1]) if wanted[i] and (kind != "k") == by_rows
        ]
        if mine:
            found = _Sweep(name, pattern, operands, launch, by_rows, mine, interpret).run()
            results |= dict(zip(mine, found, strict=True))
    return [results[i] for i in sorted(results)]


class _Sweep:
    """One pass: of rows over columns, or of columns over rows; outputs are positions of them."""

    def __init__(
        self,
        name: str,
        pattern: Pattern,
        operands: Sequence[Any],
        launch: Launch,
        by_rows: bool,
        outputs: Sequence[int],
        interpret: bool,
    ):
        self.name, self.pattern, self.by_rows = name, pattern, by_rows
        self.outputs, self.interpret, self.launch = outputs, interpret, launch
        # What is held lies along the rows of every product.
        self.tile = formulas.Tile(heads=False, turned=not by_rows)
        kinds = OPERANDS[name][0]
        self.given = tuple(x is not None for x in operands[: len(kinds)])
        q, k = operands[:2]
        self.batch, self.length, self.heads, self.width = q.shape
        self.keys, self.key_heads = k.shape[1:3]
        self.groups = self.heads // self.key_heads
        self.dtype = q.dtype
        self.wide = jnp.promote_types(q.dtype, jnp.float32)
        self.padded_width = max(SMALLEST, pl.next_power_of_2(self.width))
        sizes = (launch.held, launch.passed) if by_rows else (launch.passed, launch.held)
        # Short sequences take one tile of their own size.
        self.rows, self.columns = (
            min(size, max(SMALLEST, pl.next_power_of_2(count)))
            for size, count in zip(sizes, (self.length, self.keys), strict=True)
        )
        self.tiles = pl.cdiv(self.length, self.rows), pl.cdiv(self.keys, self.columns)
        given = zip(kinds, operands)
        self.operands = [
            self._pad(kind, i == 3, x) for i, (kind, x) in enumerate(given) if x is not None
        ]
        self.kinds = parts.chosen(self.given, kinds)
        self.ids = [
            self._pad_ids(ids, rows) for ids in operands[len(kinds) :] for rows in (True, False)
        ]

    # Outside of the programs.

    def run(self) -> list[jax.Array]:
        kinds = [OPERANDS[self.name][1][i] for i in self.outputs]
        bounds = self._bounds()
        # One pair of bounds for all of the batch, unless documents differ.
        per_batch = int(bounds.shape[0] > 1)
        inputs = [bounds, *self.operands, *self.ids]
        specs = [
            pl.BlockSpec((None, None, 2), lambda t, h, b: (b * per_batch, t, 0)),
            *(self._spec(kind) for kind in self.kinds),
            *(self._ids_spec(rows) for _ in self.ids[:1] for rows in (True, False)),
        ]
        heads = self.heads if self.by_rows else self.key_heads
        call = pl.pallas_call(
            self._program,
            grid=(self.tiles[0 if self.by_rows else 1], heads, self.batch),
            in_specs=specs,
            out_specs=[self._spec(kind) for kind in kinds],
            out_shape=[self._struct(kind) for kind in kinds],
            compiler_params=triton.CompilerParams(
                num_warps=self.launch.warps, num_stages=self.launch.stages
            ),
            interpret=self.interpret,
            name=f"attention_{self.name}_{'rows' if self.by_rows else 'columns'}",
        )
        return [self._cut(kind, x) for kind, x in zip(kinds, call(*_jax.align(inputs)))]

    def _shape(self, kind: str) -> tuple[int, ...]:
        length, keys = self.tiles[0] * self.rows, self.tiles[1] * self.columns
        return {
            "q": (self.batch, length, self.heads, self.padded_width),
            "k": (self.batch, keys, self.key_heads, self.padded_width),
            "r": (self.batch, self.heads, length),
        }[kind]

    def _struct(self, kind: str) -> jax.ShapeDtypeStruct:
        dtype = self.wide if kind == "r" else self.dtype
        return _jax.struct(self._shape(kind), dtype, self.operands)

    def _pad(self, kind: str, is_norm: bool, x: jax.Array) -> jax.Array:
        # A logsumexp of +inf is what makes the rows of the padding weigh nothing.
        fill = jnp.inf if is_norm else 0.0
        more = [(0, whole - own) for whole, own in zip(self._shape(kind), x.shape, strict=True)]
        return jnp.pad(x, more, constant_values=fill)

    def _pad_ids(self, ids: jax.Array, rows: bool) -> jax.Array:
        count = self.tiles[0] * self.rows if rows else self.tiles[1] * self.columns
        return jnp.pad(ids, ((0, 0), (0, count - ids.shape[1])), mode="edge")

    def _cut(self, kind: str, x: jax.Array) -> jax.Array:
        if kind == "r":
            return x[:, :, : self.length]
        return x[:, : self.length if kind == "q" else self.keys, :, : self.width]

    def _bounds(self) -> jax.Array:
        """`(B or 1, tiles held, 2)`: the first tile to pass over, and the last plus one."""
        rows, columns = (self.tiles[0], self.rows), (self.tiles[1], self.columns)
        needed = self.pattern.tiles(rows, columns)[None]
        if self.ids:
            # The id ranges of two tiles overlap wherever they share a document.
            cut = [x.reshape(self.batch, n, -1) for x, n in zip(self.ids, self.tiles)]
            (low, high), (first, last) = ((x.min(-1), x.max(-1)) for x in cut)
            needed &= low[:, :, None] <= last[:, None]
            needed &= high[:, :, None] >= first[:, None]
        needed = needed if self.by_rows else needed.swapaxes(1, 2)
        stop = jnp.where(needed.any(-1), needed.shape[-1] - needed[..., ::-1].argmax(-1), 0)
        return jnp.stack([needed.argmax(-1), stop], axis=-1).astype(jnp.int32)

    def _spec(self, kind: str) -> pl.BlockSpec:
        """What a program sees of an array: its tile of what it holds, all of what it passes."""
        _, size, _, width = self._shape("k" if kind == "k" else "q")
        if kind == "k":
            if self.by_rows:
                groups = self.groups
                return pl.BlockSpec(
                    (None, size, None, width), lambda t, h, b: (b, 0, h // groups, 0)
                )
            return pl.BlockSpec((None, self.columns, None, width), lambda t, h, b: (b, t, h, 0))
        if kind == "q":
            if self.by_rows:
                return pl.BlockSpec((None, self.rows, None, width), lambda t, h, b: (b, t, h, 0))
            return pl.BlockSpec((None, size, self.groups, width), lambda t, h, b: (b, 0, h, 0))
        if self.by_rows:
            return pl.BlockSpec((None, None, self.rows), lambda t, h, b: (b, h, t))
        return pl.BlockSpec((None, self.groups, size), lambda t, h, b: (b, h, 0))

    def _ids_spec(self, rows: bool) -> pl.BlockSpec:
        size = self.rows if rows else self.columns
        if rows == self.by_rows:
            return pl.BlockSpec((None, size), lambda t, h, b: (b, t))
        whole = size * self.tiles[0 if rows else 1]
        return pl.BlockSpec((None, whole), lambda t, h, b: (b, 0))

    # Inside of a program.

    def _program(self, *refs: Any) -> None:
        bounds, refs = refs[0], refs[1:]
        count = len(self.kinds)
        inputs, ids = refs[:count], refs[count : count + len(self.ids)]
        outputs = refs[count + len(self.ids) :]
        here = pl.program_id(0)
        held = "qr" if self.by_rows else "k"
        own = [ref[...] if kind in held else None for kind, ref in zip(self.kinds, inputs)]

        def operands(there, head):
            """Operands in their order, None for those that are zero; and visible pairs."""
            size = self.columns if self.by_rows else self.rows
            span = pl.ds(there * size, size)
            found = [
                x if x is not None else ref[_where(kind, span, head)]
                for kind, ref, x in zip(self.kinds, inputs, own, strict=True)
            ]
            i, j = (here, there) if self.by_rows else (there, here)
            seen = [
                ref[...] if rows == self.by_rows else ref[span]
                for rows, ref in zip((True, False), ids)
            ]
            return parts.spread(self.given, found)[0], self._visible(i, j, seen)

        def pass_over(step, sums):
            start, stop = bounds[0], bounds[1]
            if self.by_rows:
                return lax.fori_loop(start, stop, lambda j, x: step(operands(j, None), x), sums)
            return lax.fori_loop(
                0,
                self.groups,
                lambda head, y: lax.fori_loop(
                    start, stop, lambda i, x: step(operands(i, head), x), y
                ),
                sums,
            )

        found = self._forward(pass_over) if self.name == "fwd" else self._sums(pass_over)
        for ref, x in zip(outputs, found, strict=True):
            ref[...] = x.astype(ref.dtype)

    def _sums(self, pass_over) -> Any:
        def add(tile, sums):
            operands, visible = tile
            scale = self.pattern.scale
            known = operands[0], operands[1], operands[3]
            p = formulas.probabilities(self.tile, *known, scale, visible)
            terms = formulas.FORMULAS[self.name](self.tile, p, scale, *operands)
            mine = [terms[i] for i in self.outputs]
            return [x if y is None else x + y for x, y in zip(sums, mine)]

        return pass_over(add, self._zeros([OPERANDS[self.name][1][i] for i in self.outputs]))

    def _forward(self, pass_over) -> list[jax.Array]:
        def absorb(tile, state):
            (q, k, v), visible = tile
            return formulas.absorb(self.tile, state, q, k, v, self.pattern.scale, visible)

        mixed, total = self._zeros("qr")
        found = formulas.finish(pass_over(absorb, formulas.begin(total, mixed)))
        return [found[i] for i in self.outputs]

    def _zeros(self, kinds: Sequence[str]) -> list[jax.Array]:
        shapes = {
            "q": (self.rows, self.padded_width),
            "k": (self.columns, self.padded_width),
            "r": (self.rows,),
        }
        return [jnp.zeros(shapes[kind], self.wide) for kind in kinds]

    def _visible(self, i, j, ids: Sequence[jax.Array]) -> jax.Array | None:
        across = (slice(None), None) if self.tile.turned else (None, slice(None))
        rows = self.tile.each(i * self.rows + jnp.arange(self.rows, dtype=jnp.int32))
        columns = (j * self.columns + jnp.arange(self.columns, dtype=jnp.int32))[across]
        padded = self.tiles[1] * self.columns != self.keys
        band = self.pattern.visible(rows, columns, self.keys, padded)
        return both(band, self.tile.each(ids[0]) == ids[1][across] if ids else None)


def _where(kind: str, span: Any, head: Any) -> Any:
    """The index of a tile that is passed over, in what `_spec` shows of its array."""
    if kind == "k":
        return (span, slice(None))
    return (head, span) if kind == "r" else (span, head, slice(None))
