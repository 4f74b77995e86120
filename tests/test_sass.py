"""Issue slots are counted in the loop over tiles, as often as each of its blocks runs."""

from bench import sass


def listing(*instructions):
    return "".join(f"        /*{16 * i:04x}*/   {x} ;\n" for i, x in enumerate(instructions))


MASK = ["FSEL R0, R0, R1, P0"] * 30
SUMS = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"] + ["STS.64 [R2], R24"] * 29


def loop(block):
    """A loop that jumps over `block`: 16 bytes an instruction, the loop begins at the second."""
    body = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ", f"@P0 BRA {16 * (3 + len(block)):#x}"]
    return listing("MOV R1, c[0x0][0x28]", *body, *block, "FADD R0, R0, R1", "@!P1 BRA 0x10")


def test_blocks_for_masked_tiles_are_left_out():
    kept, second = sass.inner_loop(loop(MASK))
    assert (len(kept), second) == (4, 0)


def test_sums_of_every_second_tile_are_told_apart_in_fused_sweeps():
    kept, second = sass.inner_loop(loop(SUMS), fused=True)
    assert (len(kept), second) == (34, 30)
    assert len(sass.inner_loop(loop(SUMS))[0]) == 34


def test_kernels_are_named_by_primitive_sweep_and_head_dimension():
    symbol = "_ZN9attention5sweepILNS_2OpE3ELi64ELi64ELi3ELNS_5SweepE2EEEvNS_10ParametersE"
    kernel = sass.describe(symbol)
    assert kernel == {"op": "adj", "sweep": "fused", "d": 64, "tile": 64, "stages": 3}
    assert sass.title(kernel) == "adj fused, d 64"
