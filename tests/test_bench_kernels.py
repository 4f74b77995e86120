"""Records of attention's kernels: every row is there, and says what it is."""

import itertools
import json

import pytest

from bench import kernels, metagradients
from metagrad_filter.proxy import DecoderConfig, DecoderLoss


@pytest.fixture(scope="module")
def record():
    return json.loads(kernels.MEASURED.read_text())


def test_the_record_has_a_row_for_everything_that_is_asked(record):
    shapes = [list(shape) for shape in kernels.shapes()]
    for question, names in (("hessian", kernels.IMPLEMENTATIONS[:2]), ("primitives", ["adj"])):
        found = {(row["name"], *row["shape"]) for row in record[question]}
        assert found >= {(name, *shape) for name in names for shape in shapes}
    for question, each in kernels.ROUNDS_OF.items():
        keys = ("name", "windows", "tokens", "steps", "microbatch")
        found = [tuple(row[key] for key in keys) for row in record[question]]
        assert found == [(name, *shape) for shape in each for name in kernels.IN_LAYERS]
    assert record["published"] == kernels.PUBLISHED


def test_a_row_without_a_time_says_why(record):
    for question in ("hessian", "primitives", "long", "metagradient"):
        for row in record[question]:
            spent = row.get("milliseconds", row.get("seconds"))
            assert (spent is None) == row.get("why", "").startswith("not measured"), row


def test_the_stored_record_is_what_this_machine_would_write(record):
    if record["seed"] is not None:
        pytest.skip("a GPU wrote the record")
    assert {key: record[key] for key in kernels.empty()} == kernels.empty()
    assert record["device"].startswith("not measured")


def test_times_are_compared_with_published_ones_of_the_same_shape_only():
    assert kernels.against_published((32, 8192, 12, 64), 75.5) == {
        "thunderkittens": 2.0,
        "pallas": 3.72,
    }
    assert kernels.against_published((1, 8192, 12, 64), 5.56) == {"thunderkittens": 1.0}
    assert kernels.against_published((32, 8192, 12, 128), 75.5) == {}
    shapes = kernels.shapes()
    assert all(tuple(row["shape"]) in shapes for row in kernels.PUBLISHED)


def test_rounds_run_with_an_implementation_that_is_here_and_say_why_another_does_not(monkeypatch):
    tiny = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 1}
    monkeypatch.setattr(metagradients, "GPT2", tiny)
    monkeypatch.setattr(kernels, "ROUNDS_OF", {"long": [(2, 8, 2, 2)]})
    rows = {row["name"]: row for row in kernels.decoder_rounds("long", 0, lambda: False)}
    for name in ("chunked", "xla"):
        assert rows[name]["seconds"] > 0 and rows[name]["finite"]
        assert rows[name]["peak_bytes"] is None  # the CPU does not say
    for name in ("thunderkittens", "pallas"):
        assert rows[name]["why"].startswith("not measured: ConfigError")
    late = kernels.decoder_rounds("long", 0, itertools.repeat(True).__next__)
    assert all(row["why"] == "not measured: out of time" for row in late)


def test_gpt2_has_positions_for_its_windows():
    assert metagradients.gpt2(128).n_positions == 1024
    config = metagradients.gpt2(32_768, attn_implementation="xla")
    assert isinstance(config, DecoderConfig)
    assert (config.n_positions, config.remat) == (32_768, True)
    assert DecoderLoss(config).config.attn_implementation == "xla"


def test_a_metagradient_of_32768_tokens_is_predicted_to_fit_one_gpu():
    """What the README says, from its record: compiled for the CPU, run nowhere."""
    rows = {row["attention"]: row for row in json.loads(metagradients.RECORD.read_text())["long"]}
    assert all(row["tokens"] == 32_768 for row in rows.values())
    assert rows["chunked"]["predicted_bytes"] < 80e9 < rows["xla"]["predicted_bytes"]
