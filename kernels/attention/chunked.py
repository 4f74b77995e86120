"""`implementation="chunked"`: the formulas tile by tile, in O(B S H d) memory and one tile.

Answers "how does attention of any length fit?". A loop over tiles of queries holds a loop over the
tiles of keys that they see; row outputs are summed in the inner loop, column outputs in place. The
loops are never differentiated (the rules of `primitives.py` are), so their bounds may depend on the
data: tiles outside of the band, or of other documents, cost nothing. Inputs and outputs as in
`primitives.py`.

Cost: the products of `formulas` for each tile with a visible pair, one exponential a score; memory
beyond operands and outputs: copies of them, padded to whole tiles, and a few tiles of scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from metagrad_filter.kernels.attention import (  # pyright: ignore[reportMissingImports]
    _jax,
    formulas,
    parts,
    reference,
)
from metagrad_filter.kernels.attention.formulas import HEADS, OPERANDS  # pyright: ignore[reportMissingImports]
from metagrad_filter.kernels.attention.pattern import (  # pyright: ignore[reportMissingImports]
    Pattern,
    both,
    same_segment,
)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How much is computed at once.

    Attributes:
      rows: queries in a tile, at most.
      columns: keys in a tile, at most.
      scores: scores of a tile over the heads that share the loop, at most (or one head's); no
        loop at all where every score there is fits.
      widen: whether operands of 16 bits become float32 before the loop: the CPU would convert whole
        arrays in each of its steps.
    """

    rows: int
    columns: int
    scores: int
    widen: bool = True


# Two-dimensional tiles that stay in a core's cache; measured by `bench.attention`.
CPU = Tiling(rows=128, columns=128, scores=1 << 14)
# Elsewhere every head at once: the loop is sequential, and its body has to fill the device.
DEVICE = Tiling(rows=256, columns=256, scores=1 << 26, widen=False)


def run(
    name: str,
    pattern: Pattern,
    *operands: Any,
    wanted: Sequence[bool] | None = None,
    tiling: Tiling = CPU,
) -> list[jax.Array]:
    """Computes primitive `name` in float32, or float64 where the operands are.

    Args:
      name: of `formulas.OPERANDS`.
      pattern: which scores there are.
      *operands: its operands, None for those that are zero; segment ids may follow.
      wanted: which outputs to return, all by default.
      tiling: how much is computed at once.
    """
    wanted = parts.everything(name) if wanted is None else wanted
    q, k = operands[:2]
    batch, length, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    if batch * heads * length * keys <= tiling.scores:
        return reference.run(name, pattern, *operands, wanted=wanted)
    if q.dtype.itemsize == 2 and tiling.widen:
        count = len(OPERANDS[name][0])
        wide = [None if x is None else x.astype(jnp.float32) for x in operands[:count]]
        found = run(name, pattern, *wide, *operands[count:], wanted=wanted, tiling=tiling)
        outputs = parts.chosen(wanted, OPERANDS[name][1])
        return [x if kind == "r" else x.astype(q.dtype) for kind, x in zip(outputs, found)]
    rows, columns = _pieces(length, tiling.rows), _pieces(keys, tiling.columns)
    together = max(1, tiling.scores // (rows[1] * columns[1] * (heads // key_heads)))
    each_heads = _divisor(key_heads, together)
    each_batch = _divisor(batch, together // each_heads)
    kinds = OPERANDS[name][0] + "i" * (len(operands) - len(OPERANDS[name][0]))
    outputs = parts.chosen(wanted, OPERANDS[name][1])
    counts = (each_batch, each_heads, heads // key_heads)

    def part(kind: str, x: jax.Array, group) -> tuple[list[Any], list[int]]:
        """Where a group's part of an array begins, and its shape."""
        start, shape = [0] * x.ndim, list(x.shape)
        start[0], shape[0] = group // (key_heads // each_heads) * each_batch, each_batch
        axis = {"q": 2, "k": 2, "r": 1, "i": None}[kind]
        if axis is not None:
            size = each_heads * (1 if kind == "k" else counts[2])
            start[axis], shape[axis] = group % (key_heads // each_heads) * size, size
        return start, shape

    def add(group, found):
        mine = [
            None if x is None else lax.dynamic_slice(x, *part(kind, x, group))
            for kind, x in zip(kinds, operands)
        ]
        added = _Group(name, pattern, mine, wanted, rows, columns).run()
        return [
            lax.dynamic_update_slice(whole, x, part(kind, whole, group)[0])
            for kind, whole, x in zip(outputs, found, added)
        ]

    groups = batch * key_heads // (each_batch * each_heads)
    return lax.fori_loop(0, groups, add, [parts.zeros(kind, q, k) for kind in outputs])


def _pieces(count: int, most: int) -> tuple[int, int]:
    """Number of tiles, and the size of each: as even as multiples of 8 allow."""
    tiles = -(-count // most)
    return tiles, count if tiles == 1 else -(-count // (8 * tiles)) * 8


def _divisor(count: int, most: int) -> int:
    return next(n for n in range(min(count, max(1, most)), 0, -1) if count % n == 0)


def _add_at(tiles: jax.Array, j: jax.Array, x: jax.Array) -> jax.Array:
    tile = lax.dynamic_index_in_dim(tiles, j, 0, False) + x
    return lax.dynamic_update_index_in_dim(tiles, tile, j, 0)


class _Group:
    """One primitive for the heads that share the loops over tiles; arguments as in `run`."""

    def __init__(
        self,
        name: str,
        pattern: Pattern,
        operands: Sequence[Any],
        wanted: Sequence[bool],
        rows: tuple[int, int],
        columns: tuple[int, int],
    ):
        self.name, self.pattern = name, pattern
        self.kinds, self.wanted = OPERANDS[name][0], wanted
        self.outputs = parts.chosen(wanted, OPERANDS[name][1])
        self.operands = operands[: len(self.kinds)]
        self.segments = operands[len(self.kinds) :]
        q, k = self.operands[:2]
        self.batch, self.length, self.heads, self.width = q.shape
        self.keys, self.key_heads = k.shape[1:3]
        self.groups = self.heads // self.key_heads
        self.n = self.batch * self.key_heads
        self.dtype = q.dtype
        self.accumulator = jnp.promote_types(q.dtype, jnp.float32)
        self.rows, self.columns = rows, columns

    # Layouts: row operands (tiles, n, g, i, d), columns (tiles, n, j, d), statistics
    # (tiles, n, g, i), segment ids (tiles, n, i).

    def _lay(self, kind: str, position: int, x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        tiles, size = self.columns if kind == "k" else self.rows
        if kind == "r":
            # A logsumexp of +inf is what makes the rows of the padding weigh nothing.
            fill = jnp.inf if position == 3 else 0.0
            x = jnp.pad(x, ((0, 0), (0, 0), (0, tiles * size - self.length)), constant_values=fill)
            return jnp.moveaxis(x.reshape(self.n, self.groups, tiles, size), 2, 0)
        x = jnp.pad(x, ((0, 0), (0, tiles * size - x.shape[1]), (0, 0), (0, 0)))
        x = x.reshape(self.batch, tiles, size, x.shape[2], self.width).transpose(1, 0, 3, 2, 4)
        inner = (size, self.width) if kind == "k" else (self.groups, size, self.width)
        return x.reshape(tiles, self.n, *inner)

    def _lay_ids(self, tiles: int, size: int, ids: jax.Array) -> jax.Array:
        ids = jnp.pad(ids, ((0, 0), (0, tiles * size - ids.shape[1])), mode="edge")
        ids = jnp.repeat(ids, self.key_heads, axis=0).reshape(self.n, tiles, size)
        return ids.swapaxes(0, 1)

    def _unlay(self, kind: str, x: jax.Array) -> jax.Array:
        tiles, size = self.columns if kind == "k" else self.rows
        if kind == "r":
            x = jnp.moveaxis(x, 0, 2).reshape(self.batch, self.heads, -1)
            return x[:, :, : self.length]
        x = x.reshape(tiles, self.batch, -1, size, self.width).transpose(1, 0, 3, 2, 4)
        x = x.reshape(self.batch, tiles * size, -1, self.width)
        return x[:, : self.keys if kind == "k" else self.length].astype(self.dtype)

    # The loops.

    def run(self) -> list[jax.Array]:
        laid = [self._lay(kind, i, x) for i, (kind, x) in enumerate(zip(self.kinds, self.operands))]
        ids = [self._lay_ids(*x, s) for s in self.segments for x in (self.rows, self.columns)]
        starts, stops = self._bounds(ids)
        mine = [x for kind, x in zip(self.kinds, laid) if kind != "k"]
        theirs = [x for kind, x in zip(self.kinds, laid) if kind == "k"]
        row_ids, column_ids = ids[:1], ids[1:]
        step = self._forward if self.name == "fwd" else self._sums

        def queries(columns, x):
            i, start, stop, mine, row_ids = x

            def tile(j):
                """Operands in their order, and which of the scores are visible."""
                theirs_j, ids_j = jax.tree.map(
                    lambda y: lax.dynamic_index_in_dim(y, j, 0, False), (theirs, column_ids)
                )
                rest = {"k": iter(theirs_j), "q": (own := iter(mine)), "r": own}
                both = [next(rest[kind]) for kind in self.kinds]
                wide = [None if y is None else y.astype(self.accumulator) for y in both]
                return wide, self._visible(i, j, [*row_ids, *ids_j])

            return step(tile, start, stop, columns)

        columns = self._zeros("k")
        tiles = jnp.arange(self.rows[0])
        columns, rows = lax.scan(queries, columns, (tiles, starts, stops, mine, row_ids))
        found = {"k": iter(columns), "q": (own := iter(rows)), "r": own}
        return [self._unlay(kind, next(found[kind])) for kind in self.outputs]

    def _sums(self, tile: Callable[..., Any], start, stop, columns):
        def add(j, sums):
            rows, columns = sums
            operands, visible = tile(j)
            scale = self.pattern.scale
            p = formulas.probabilities(HEADS, operands[0], operands[1], operands[3], scale, visible)
            terms = formulas.FORMULAS[self.name](HEADS, p, scale, *operands)
            terms = parts.chosen(self.wanted, terms)
            mine = [x for kind, x in zip(self.outputs, terms) if kind != "k"]
            theirs = [x for kind, x in zip(self.outputs, terms) if kind == "k"]
            updated = [x if y is None else _add_at(x, j, y) for x, y in zip(columns, theirs)]
            return [x if y is None else x + y for x, y in zip(rows, mine)], updated

        rows, columns = lax.fori_loop(start, stop, add, (self._zeros("qr"), columns))
        return columns, rows

    def _forward(self, tile: Callable[..., Any], start, stop, columns):
        def add(j, state):
            (q, k, v), visible = tile(j)
            return formulas.absorb(HEADS, state, q, k, v, self.pattern.scale, visible)

        mixed, total = self._zeros("qr", OPERANDS["fwd"][1])
        state = lax.fori_loop(start, stop, add, formulas.begin(total, mixed))
        return columns, parts.chosen(self.wanted, formulas.finish(state))

    def _zeros(self, kinds: str, outputs: Sequence[str] | None = None) -> list[jax.Array]:
        """Where `outputs`, or what is wanted, of these kinds are summed: a tile, or all columns."""
        rows = (self.n, self.groups, self.rows[1])
        shapes = {
            "q": (*rows, self.width),
            "r": rows,
            "k": (self.columns[0], self.n, self.columns[1], self.width),
        }
        summed = [kind for kind in outputs or self.outputs if kind in kinds]
        zeros = [jnp.zeros(shapes[kind], self.accumulator) for kind in summed]
        # What is summed varies between devices as the operands do.
        return [_jax.align([x, self.operands[0]])[0] for x in zeros]

    def _visible(self, i, j, ids: list[jax.Array]) -> jax.Array | None:
        rows = i * self.rows[1] + jnp.arange(self.rows[1])[:, None]
        columns = j * self.columns[1] + jnp.arange(self.columns[1])[None]
        padded = self.columns[0] * self.columns[1] != self.keys
        band = self.pattern.visible(rows, columns, self.keys, padded)
        return both(band, same_segment(*ids) if ids else None)

    def _bounds(self, ids: list[jax.Array]):
        """First and last plus one tile of keys for each tile of queries."""
        needed = self.pattern.tiles(self.rows, self.columns)
        if ids:
            # The id ranges of two tiles overlap wherever they share a document.
            rows, columns = ((x.min(-1), x.max(-1)) for x in ids)
            shared = (rows[0][:, None] <= columns[1]) & (rows[1][:, None] >= columns[0])
            needed &= shared.any(-1)
        last = self.columns[0] - needed[:, ::-1].argmax(1)
        return needed.argmax(1), jnp.where(needed.any(1), last, 0)
