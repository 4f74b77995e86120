"""The README's example runs as it stands, and its table is the stored record's."""

import functools
import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import optax
import pytest

import metagrad_filter as mgf
from bench import (
    distillation,
    drift,
    estimators,
    loader,
    metagradients,
    own_pool,
    refresh,
    series,
    series_demo,
    throughput,
)
from bench.demo import RECORD, with_table
from bench.readme import README, replaced
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder

EXAMPLE = re.compile(r"<!-- example[^>]*-->\n```python\n(.*?)```", re.DOTALL)


def test_example_trains_on_a_filtered_stream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = EXAMPLE.search(README.read_text())
    assert code is not None
    assert len(code[1].splitlines()) <= 12
    config = DecoderConfig(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    loss = DecoderLoss(config)
    adamw = functools.partial(optax.adamw, b2=0.95)
    params = init_decoder(config)
    tokens = np.random.default_rng(0).integers(0, 32, (6144, 9), dtype=np.int32)
    trained = []

    def train_step(params, opt_state, batch):
        trained.append(batch)
        return params, opt_state

    names = {
        "loss": loss,
        "adamw": adamw,
        "params": params,
        "opt_state": adamw(1e-3).init(params),
        "held_out": tokens[:64],
        "tokens": tokens,
        "source": [{"tokens": window} for window in tokens],
        "train_step": train_step,
    }
    exec(compile(code[1], "README.md", "exec"), names)

    kept = np.concatenate(trained)
    assert len(kept) == len(tokens) // 4
    known = {window.tobytes() for window in tokens}
    assert all(window.tobytes() in known for window in kept)
    # The state that the loop handed over is there for the calibrator.
    assert [path.name for path in Path("run/live").glob("*/*") if path.name.isdigit()] == ["0"]
    again = mgf.score_filter(
        names["grain"].MapDataset.source(names["source"]).shuffle(seed=0),
        "run",
        keep_ratio=0.25,
        windows=mgf.TextWindows("tokens"),
    )
    np.testing.assert_array_equal(np.stack([e["tokens"] for e in islice(again, len(kept))]), kept)


def test_table_is_the_record():
    if not RECORD.exists():
        pytest.fail("bench/records/demo.json is missing; run `make bench`")
    readme = README.read_text()
    assert with_table(readme, json.loads(RECORD.read_text())) == readme


def test_the_metagradients_tables_are_the_record():
    readme, record = README.read_text(), json.loads(metagradients.RECORD.read_text())
    text = metagradients.table(record)
    assert replaced(readme, "metagradients-table", text) == readme


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (throughput, "throughput-table"),
        (loader, "loader-table"),
        (distillation, "distillation-table"),
        (drift, "drift-table"),
        (refresh, "refresh-table"),
        (own_pool, "own-pool-table"),
        (estimators, "estimators-table"),
        (series_demo, "series-demo-table"),
        (series, "series-table"),
    ],
)
def test_the_cost_tables_are_the_records(module, name):
    readme, record = README.read_text(), json.loads(module.RECORD.read_text())
    assert replaced(readme, name, module.table(record)) == readme


def test_record_has_three_paired_seeds_and_every_method():
    record = json.loads(RECORD.read_text())
    methods = record["methods"]
    assert set(methods) == {
        "random",
        "low_perplexity",
        "domain_match",
        "rho_loss",
        "metagrad",
        "on_target_only",
    }
    assert all(len(method["loss"]) == 3 for method in methods.values())
    assert len(record["versions"]) >= 2
