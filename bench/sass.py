"""Issue slots that a kernel's inner loop costs, counted in the machine code that ships.

    slots(library, cuobjdump) -> {"adj row, d 64": {"per_element": 19.9, ...}, ...}

The loop is the smallest one that holds tensor-core instructions; blocks of it that are jumped over
where a tile needs no mask are left out, and what a warpgroup does after every second tile (the
sums of fused bwd and hess) counts half. Each instruction takes one issue slot of a warp, for 32
threads; a thread holds 64 / 128 of the scores of a column of its tile.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

OPS = ("lin", "bwd", "hess", "adj")
SWEEPS = ("row", "column", "fused")
_SWEEP = re.compile(r"sweepILNS_2OpE(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELNS_5SweepE([012])E")
_FORWARD = re.compile(r"forwardILi(\d+)ELi(\d+)ELi(\d+)E")
_MASK = 20  # instructions of a block that is jumped over, at least


def describe(symbol: str) -> dict[str, Any]:
    """Primitive, sweep, head dimension, tile and stages of a kernel, from its mangled name."""
    if match := _SWEEP.search(symbol):
        op, width, tile, stages, sweep = map(int, match.groups())
        return {"op": OPS[op], "sweep": SWEEPS[sweep], "d": width, "tile": tile, "stages": stages}
    match = _FORWARD.search(symbol)
    if match is None:
        raise ValueError(f"{symbol} is no kernel of the plugin.")
    width, tile, stages = map(int, match.groups())
    return {"op": "fwd", "sweep": "row", "d": width, "tile": tile, "stages": stages}


def title(kernel: dict[str, Any]) -> str:
    return f"{kernel['op']} {kernel['sweep']}, d {kernel['d']}"


def find(environ: Any) -> str | None:
    """The disassembler: `CUOBJDUMP`, or what is on the PATH."""
    return environ.get("CUOBJDUMP") or shutil.which("cuobjdump")


def slots(library: Path, cuobjdump: str) -> dict[str, dict[str, Any]]:
    """Counts for every kernel of a library."""
    text = subprocess.run(
        [cuobjdump, "-sass", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        symbol, _, code = part.partition("\n")
        kernel = describe(symbol)
        body, second = inner_loop(code, fused=kernel["sweep"] == "fused")
        slots = len(body) - second / 2
        kinds = collections.Counter(_mnemonic(x) for x in body)
        found[title(kernel)] = {
            "instructions": len(body),
            "tensor_core": kinds["HGMMA"],
            "local_memory": kinds["LDL"] + kinds["STL"],
            "per_element": round(slots / (kernel["tile"] / 2), 2),
        }
    return found


def inner_loop(code: str, fused: bool = False) -> tuple[list[str], int]:
    """Instructions of the loop over tiles, for a tile that needs no mask.

    Args:
      code: of one kernel, as the disassembler prints it.
      fused: whether it has blocks that multiply, or write floats to shared memory, and that are
        jumped over for every second tile.

    Returns:
      The instructions, and how many of them are in such blocks.
    """
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.+?)\s*;", code, re.MULTILINE)
    addresses = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    instructions = [x for _, x in lines]
    jumps = {}
    for i, x in enumerate(instructions):
        if match := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", x):
            jumps[i] = addresses[int(match[1], 16)]

    def multiplies(start: int, stop: int) -> bool:
        return any("HGMMA" in x for x in instructions[start:stop])

    loops = [(to, i) for i, to in jumps.items() if to <= i and multiplies(to, i)]
    first, last = min(loops, key=lambda loop: loop[1] - loop[0])
    kept, second, i, until = [], 0, first, first
    while i <= last:
        kept.append(instructions[i])
        second += i < until
        to = jumps.get(i, i)
        block = instructions[i + 1 : to] if i + _MASK < to <= last else []
        sums = fused and any("HGMMA" in x or "STS.64" in x for x in block)
        if sums:
            until = max(until, to)
        jumped = bool(block) and not sums and not multiplies(i + 1, to)
        i = to if jumped else i + 1
    return kept, second


def _mnemonic(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]
