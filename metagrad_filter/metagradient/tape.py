"""What the backward sweep keeps of a trajectory, and how that is chosen.

The backward sweep needs parameters, optimizer state and gradient of every step, last step first.
With |p| bytes of parameters and |s| of parameters and optimizer state together, T steps take

    tape        memory                      model evaluated    what is done again
    state       T (|p| + |s|)               once more          nothing
    gradient    T |p| + T/16 |s|            once more          optimizer updates
    segments    (T/S) |s| + S |p|           twice more         S steps from an anchor, and updates
    2 levels    (T/S' + S'/S) |s| + S |p|   three times more   S' steps, then as above

"Once more" is the one evaluation of the adjoint itself. Anchors may lie in host memory. Results do
not depend on the tape. Replaying optimizer updates needs no model and no inverse of the update, so
it serves every optimizer; reversing Adam algebraically would grow rounding errors by b1^-1 a step.

Reference: Engstrom et al., 2025, https://arxiv.org/abs/2503.13751, section 3.2 (REPLAY, k-ary).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from metagrad_filter.errors import ConfigError
from metagrad_filter.metagradient.optimizer import is_float
from metagrad_filter.types import PyTree

Kind = Literal["state", "gradient", "segments"]
KINDS = ("auto", "state", "gradient", "segments")

_BLOCK = 16  # optimizer updates are replayed from a state at most this many steps back
_STATE_TAPE_BYTES = 1 << 30  # above this, storing four copies a step costs more than replaying
_OFFLOADED = 8  # steps between anchors in host memory, at most
_SHARE_OF_FREE = 0.5  # the rest is for activations, the outer metric and what training needs


@dataclass(frozen=True)
class Sizes:
    """Bytes that one copy of each thing takes on one device."""

    params: int
    state: int  # parameters and optimizer state
    cotangents: int  # of parameters, moments and gradient, over all targets


@dataclass(frozen=True)
class Tape:
    """What one sweep keeps. `str(tape)` says it in a sentence.

    Attributes:
      kind: "state", "gradient" or "segments".
      spans: steps between anchors, widest level first; empty unless kind is "segments".
      block: steps between the states from which optimizer updates are replayed; 1 keeps every one.
      offload: whether anchors, and the end of the trajectory, lie in host memory.
      nbytes: device memory of tape, anchors, running state and cotangents, in bytes, without the
        activations of the model.
      free_bytes: device memory that was free, in bytes, or None where the device does not say.
    """

    kind: Kind
    spans: tuple[int, ...]
    block: int
    offload: bool
    nbytes: int
    free_bytes: int | None = None

    def __str__(self) -> str:
        kept = {
            "state": "parameters, moments and gradient of every step",
            "gradient": f"every gradient, and every {self.block}th state",
            "segments": f"states {' and '.join(f'{s} steps apart' for s in self.spans)}"
            + (" in host memory" if self.offload else ""),
        }[self.kind]
        free = "" if self.free_bytes is None else f" of {_amount(self.free_bytes)} free"
        return f"{self.kind}: keeps {kept}; {_amount(self.nbytes)}{free}"


def choose_tape(
    kind: str,
    steps: int,
    sizes: Sizes,
    *,
    levels: int | None = None,
    offload: bool | None = None,
    free_bytes: int | None = None,
    has_host_memory: bool = False,
) -> Tape:
    """Resolves `kind` for a trajectory of `steps` steps; pure arithmetic.

    "auto" takes the cheapest tape that fits half of the free memory, in the order state (up to 1
    GiB), gradient, segments on one, two and three levels, then the same with anchors in host
    memory; where nothing fits, the smallest.

    Args:
      kind: "auto", "state", "gradient" or "segments".
      steps: T.
      sizes: of one copy of each thing.
      levels: of "segments", 1 to 3; None for one, or for what "auto" needs.
      offload: anchors in host memory; None leaves it to "auto" and means no elsewhere.
      free_bytes: free device memory, or None if unknown (then "auto" takes "state" up to 1 GiB,
        and "gradient" above).
      has_host_memory: whether the device can hand arrays to a memory of the host.

    Raises:
      ConfigError: an argument is out of its domain.
    """
    if kind not in KINDS:
        raise ConfigError(f"tape={kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
    if levels is not None and (isinstance(levels, bool) or levels not in (1, 2, 3)):
        raise ConfigError(f"levels={levels!r}; expected 1, 2 or 3, or None.")
    if levels is not None and kind in ("state", "gradient"):
        raise ConfigError(f"levels={levels!r} has no meaning for tape={kind!r}; pass 'segments'.")
    if offload and kind in ("state", "gradient"):
        raise ConfigError(
            f"offload=True has no meaning for tape={kind!r}, which keeps no anchors; pass "
            "'segments' or 'auto'."
        )
    if offload and levels not in (None, 1):
        raise ConfigError(
            f"levels={levels!r} with offload=True; anchors in host memory are kept on one level: "
            "pass either."
        )
    if offload and not has_host_memory:
        raise ConfigError(
            "offload=True, but this device has no pinned host memory beside its own; leave offload "
            "out and pass levels=2 or 3 to keep less."
        )

    def tape(kind: Kind, levels: int = 1, offload: bool = False) -> Tape:
        spans = () if kind != "segments" else _spans(steps, levels, sizes, offload)
        block = 1 if kind == "state" else _block(spans[-1] if spans else steps)
        held = _held(kind, steps, spans, block, offload, sizes)
        return Tape(kind, spans, block, offload, held, free_bytes)

    def choices() -> Iterator[Tape]:
        if levels is None and not offload:
            state = tape("state")
            if state.nbytes <= _STATE_TAPE_BYTES:
                yield state
            yield tape("gradient")
        if not offload:
            yield from (tape("segments", depth) for depth in ([levels] if levels else (1, 2, 3)))
        if has_host_memory and offload is not False:
            yield tape("segments", 1, True)

    if kind == "segments":
        return tape("segments", levels or 1, bool(offload))
    if kind != "auto":
        return tape(kind)  # pyright: ignore[reportArgumentType]
    budget = math.inf if free_bytes is None else free_bytes * _SHARE_OF_FREE
    smallest = None
    for choice in choices():
        if choice.nbytes <= budget:
            return choice
        if smallest is None or choice.nbytes < smallest.nbytes:
            smallest = choice
    assert smallest is not None
    return smallest


def sizes_of(params: PyTree, opt_state: PyTree, targets: int) -> Sizes:
    """Sizes on one device, also for sharded arrays and for `jax.ShapeDtypeStruct`s."""
    of_params, of_state = _bytes(params), _bytes(opt_state)
    wide = _bytes(params, wide=True)
    moments = _bytes([x for x in jax.tree.leaves(opt_state) if is_float(x)], wide=True)
    return Sizes(of_params, of_params + of_state, targets * (4 * wide + moments))


def free_bytes(params: PyTree) -> int | None:
    """Free memory in bytes of the device that holds `params`, or None where nobody says."""
    device = _device(params)
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return available_host_bytes() if device.platform == "cpu" else None


def available_host_bytes() -> int | None:
    """Main memory in bytes that programs can still have, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def has_host_memory(params: PyTree) -> bool:
    """Whether the device that holds `params` knows a pinned memory of the host."""
    return any(m.kind == "pinned_host" for m in _device(params).addressable_memories())


def _device(params: PyTree) -> Any:
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.sharding.addressable_devices))
    return jax.local_devices()[0]


def _bytes(tree: PyTree, *, wide: bool = False) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        dtype = jnp.promote_types(leaf.dtype, jnp.float32) if wide else leaf.dtype
        sharding = getattr(leaf, "sharding", None)
        shape = jnp.shape(leaf) if sharding is None else sharding.shard_shape(jnp.shape(leaf))
        total += math.prod(shape) * jnp.dtype(dtype).itemsize
    return total


def _block(swept: int) -> int:
    """Steps a block: at most 16, dividing the swept steps where that wastes little."""
    if swept <= _BLOCK:
        return swept
    for block in range(_BLOCK, _BLOCK // 2, -1):
        if swept % block == 0:
            return block
    return math.ceil(swept / math.ceil(swept / _BLOCK))


def _spans(steps: int, levels: int, sizes: Sizes, offload: bool) -> tuple[int, ...]:
    """The nested spans that keep least on the device; in host memory anchors are free."""
    candidates = {round(steps ** (i / 24)) for i in range(25)}
    candidates |= {s for s in range(1, min(steps, 128) + 1) if steps % s == 0}

    def chains(widest: int, depth: int) -> list[tuple[int, ...]]:
        if depth == 0:
            return [()]
        inner = sorted(s for s in candidates if s <= widest)
        return [
            (s, *rest)
            for s in inner
            for rest in chains(s, depth - 1)
            if not rest or s % rest[0] == 0
        ]

    def cost(spans: tuple[int, ...]) -> float:
        unfilled = any(width % span for width, span in zip((steps, *spans), spans))
        if offload:
            # Shorter ones would save device memory, but every anchor crosses the bus twice.
            return abs(spans[-1] - min(math.ceil(math.sqrt(steps)), _OFFLOADED)) + 2 * unfilled
        held = _held("segments", steps, spans, _block(spans[-1]), offload, sizes)
        return held * (1.05 if unfilled else 1.0)

    return min(chains(steps, levels), key=cost)


def _held(
    kind: str, steps: int, spans: tuple[int, ...], block: int, offload: bool, sizes: Sizes
) -> int:
    """Bytes on the device at the fullest moment, without activations."""
    always = sizes.cotangents + sizes.state + (0 if offload else sizes.state)
    if kind == "state":
        return always + steps * (sizes.params + sizes.state)
    swept = spans[-1] if spans else steps
    tape = swept * sizes.params + (math.ceil(swept / block) - 1) * sizes.state
    if offload:
        anchors = 1
    else:
        widths = (steps, *spans)
        anchors = sum(math.ceil(w / s) - 1 for w, s in itertools.pairwise(widths))
    return always + tape + anchors * sizes.state


def _amount(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
