"""Which keys a query sees: a band around its position, within its document.

Query `i` sees key `j` where `i - left <= j <= i + right`, and where both carry the same segment id.
Positions of queries and keys start at 0 both, also where there are more of one than of the other.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What is static about the scores of one call.

    Attributes:
      scale: factor of `q k^T`.
      left: keys that a query sees before its own position, None for all.
      right: keys that it sees after its own position, None for all.
    """

    scale: float
    left: int | None = None
    right: int | None = None

    def visible(self, rows, columns, keys: int, padded: bool = False) -> jax.Array | None:
        """Which of these pairs of positions are in the band.

        Args:
          rows: `(i, 1)` positions of queries.
          columns: `(1, j)` positions of keys.
          keys: number of keys.
          padded: whether positions from `keys` on occur; they are padding.

        Returns:
          `(i, j)` bool, or None where every pair of real positions is visible.
        """
        tests: list[jax.Array] = []
        if self.right is not None:
            tests.append(columns <= rows + self.right)
        if self.left is not None:
            tests.append(columns >= rows - self.left)
        if padded:
            tests.append(columns < keys)
        return functools.reduce(jnp.logical_and, tests) if tests else None

    def blind_from(self, keys: int) -> int | None:
        """The first position whose query sees no key at all, however many queries there are."""
        return None if self.left is None else keys + self.left

    def tiles(self, queries: tuple[int, int], keys: tuple[int, int]) -> jax.Array:
        """Which tiles hold a visible pair.

        Args:
          queries: number of tiles, and of queries in each.
          keys: the same for keys.

        Returns:
          `(tiles of queries, tiles of keys)` bool.
        """
        first_row = jnp.arange(queries[0])[:, None] * queries[1]
        first_column = jnp.arange(keys[0])[None] * keys[1]
        needed = jnp.ones((queries[0], keys[0]), bool)
        if self.right is not None:
            needed &= first_column <= first_row + queries[1] - 1 + self.right
        if self.left is not None:
            needed &= first_column + keys[1] - 1 >= first_row - self.left
        return needed


def same_segment(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`(n, i)` and `(n, j)` ids to `(n, 1, i, j)` bool."""
    return rows[:, None, :, None] == columns[:, None, None, :]


def both(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
    """Pairs that both let through; None lets all through."""
    if first is None or second is None:
        return second if first is None else first
    return first & second
