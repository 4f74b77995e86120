"""Examples: windows of both ends by the version in use, decoded, harmless, and only when asked."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hotlane import make_scorer, make_windows
from hypothesis import given
from hypothesis import strategies as st
from real_run import VOCABULARY, WORDS, real_run, tokenizer

import metagrad_filter as mgf
from metagrad_filter import cli
from metagrad_filter.errors import ConfigError
from metagrad_filter.labels import LabelStore, RoundLabels
from metagrad_filter.monitor.decoding import ids_text, load_decoder, visible
from metagrad_filter.monitor.examples import Examples
from metagrad_filter.monitor.page import report_html, write_run_report
from metagrad_filter.monitor.server import serve
from metagrad_filter.monitor.view import run_view
from metagrad_filter.scorer.series import SeriesScorer
from metagrad_filter.spool import Spool


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return real_run(tmp_path_factory.mktemp("run") / "run", blocks=128)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json")


def spooled(run_dir, windows, name="train"):
    """Sets windows aside as a filter does, and leaves its record."""
    spool = Spool(run_dir, name, share=1.0)
    spool.offer(0, windows)
    spool.flush()
    (run_dir / "metrics" / name).mkdir(parents=True, exist_ok=True)


def test_both_ends_are_what_the_acting_version_ranks_there(run_dir, words):
    view = run_view(run_dir, examples=Examples(run_dir, 5, tokenizer=words))
    found = view["examples"]
    assert view["problems"] == [] and found["version"] == view["filters"]["train"]["version"]
    assert found["origin"] == "the newest that filter train set aside"
    assert len(found["high"]) == len(found["low"]) == 5
    assert found["high"][0]["share"] == 1 and found["low"][0]["share"] == 0
    scores = [e["score"] for e in [*found["high"], *reversed(found["low"])]]
    assert scores == sorted(scores, reverse=True)
    scorer = mgf.Registry(run_dir).load(found["version"])
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    again = np.array([[ids[word] for word in found["high"][0]["text"].split()]], np.int32)
    assert scorer.score(again)[0] == np.float32(scores[0])
    # What was planted: papers are good, advertisements are bad.
    papers, web = set(WORDS["papers"].split()), set(WORDS["web"].split())
    high, low = (set(found[end][0]["text"].split()) for end in ("high", "low"))
    assert len(high & papers) > len(high & web) and len(low & web) > len(low & papers)


def test_nothing_of_the_stream_is_shown_unless_it_is_asked_for(run_dir, tmp_path):
    path, view = write_run_report(run_dir, tmp_path / "report.html")
    assert view["examples"] is None and "free shipping" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    path, view = write_run_report(run_dir, tmp_path / "report.html", examples=2)
    assert len(view["examples"]["low"]) == 2 and path.stat().st_mode & 0o777 == 0o600


def test_without_a_tokenizer_ids_are_shown(run_dir):
    found = run_view(run_dir, examples=Examples(run_dir, 1))["examples"]
    assert all(0 <= int(i) < len(VOCABULARY) for i in found["high"][0]["text"].split())
    assert ids_text(np.arange(5), 3) == "0 1 2 …"


def test_labels_stand_in_where_nothing_is_spooled(tmp_path):
    mgf.Registry(tmp_path).publish(make_scorer())
    windows = make_windows(64)
    for number in (1, 2):
        labels = RoundLabels(windows, np.zeros((2, 64), np.float32))
        LabelStore(tmp_path).append(number, labels)
    (tmp_path / "labels" / "round-000002.npz").write_bytes(b"torn")
    examples = Examples(tmp_path, 50)
    found = run_view(tmp_path, examples=examples)["examples"]
    assert found["origin"] == "labelled in round 1" and found["windows"] == 64
    # Never more than there are, and none twice.
    assert len(found["high"]) == len(found["low"]) == 32
    texts = [e["text"] for e in [*found["high"], *found["low"]]]
    assert len(set(texts)) == 64


def test_what_is_missing_is_said_in_words(tmp_path):
    assert "no version" in run_view(tmp_path, examples=Examples(tmp_path, 3))["examples"]["missing"]
    mgf.Registry(tmp_path).publish(make_scorer())
    found = run_view(tmp_path, examples=Examples(tmp_path, 3))["examples"]
    assert "spool_share" in found["missing"] and found["high"] == []
    spooled(tmp_path, make_windows(16) + 1000)
    found = run_view(tmp_path, examples=Examples(tmp_path, 3))["examples"]
    assert found["missing"].startswith("version 1 cannot score them: ")


def test_series_are_thinned_and_not_text(tmp_path):
    registry = mgf.Registry(tmp_path)
    registry.publish(series_scorer())
    rng = np.random.default_rng(0)
    spooled(tmp_path, rng.normal(size=(32, 500, 2)).astype(np.float32).cumsum(axis=1))
    found = run_view(tmp_path, examples=Examples(tmp_path, 2))["examples"]
    example = found["high"][0]
    assert "text" not in example and example["length"] == 500
    assert [len(channel) for channel in example["series"]] == [96, 96]


def series_scorer() -> SeriesScorer:
    from metagrad_filter.scorer.fit import fit_scorer

    rng = np.random.default_rng(0)
    windows = rng.normal(size=(128, 500, 2)).astype(np.float32).cumsum(axis=1)
    return fit_scorer(windows, windows[:, -1, 0], kind="series")


def test_new_windows_and_a_new_version_are_taken_up_by_the_same_object(tmp_path):
    registry, examples = mgf.Registry(tmp_path), Examples(tmp_path, 1)
    registry.publish(make_scorer(1))
    spooled(tmp_path, make_windows(16, seed=1))
    assert run_view(tmp_path, examples=examples)["examples"]["windows"] == 16
    spooled(tmp_path, make_windows(16, seed=2))
    registry.publish(make_scorer(2))
    found = run_view(tmp_path, examples=examples)["examples"]
    assert (found["windows"], found["version"]) == (32, 2)


HOSTILE = "</script><b>\"'&\u202eevil\u2066\x00\x1b[31m\ufeff\u2028\ud800".encode(
    errors="replace"
).decode()


def test_hostile_windows_are_harmless_and_cut(tmp_path):
    path = tokenizer(tmp_path / "tokenizer.json")
    document = json.loads(path.read_text())
    document["model"]["vocab"] = {"[UNK]": 0, HOSTILE: 1}
    path.write_text(json.dumps(document))
    text = load_decoder(path)(np.full(10_000, 1))
    shown = visible(text, 2000)
    assert len(shown) < 20_000 and shown.endswith("…")
    page = report_html(
        {"filters": {}, "examples": {"high": [{"score": 1.0, "share": 1.0, "text": shown}]}}
    )
    assert "</script><b>" not in page and not set(page) & set("\u202e\u2066\x00\x1b\ufeff\u2028")


@given(st.text(max_size=300), st.integers(1, 200))
def test_every_character_of_what_is_shown_shows(text, most):
    shown = visible(text, most)
    allowed = set("\n\t\u200c\u200d")
    hidden = {c for c in shown if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"}
    assert hidden <= allowed
    plain = [c for c in text[:most] if unicodedata.category(c)[0] in "LNP"]
    assert len(shown) >= len(plain)


@pytest.mark.parametrize("count", [-1, 51, 2.0, True, "3"])
def test_a_bad_number_is_refused(tmp_path, count):
    with pytest.raises(ConfigError, match="examples is"):
        write_run_report(tmp_path, tmp_path / "report.html", examples=count)


def test_bad_tokenizers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="which is no file"):
        load_decoder(tmp_path / "nothing.json")
    (tmp_path / "tokenizer.json").write_text("{")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_decoder(place)
    with pytest.raises(ConfigError, match="no examples are asked for"):
        write_run_report(tmp_path, tmp_path / "report.html", tokenizer="gpt2")


@pytest.mark.slow
def test_a_name_that_is_not_cached_is_refused_without_a_network(monkeypatch):
    with pytest.raises(ConfigError, match="not in this machine's cache"):
        load_decoder("nobody-here/no-such-tokenizer")


def test_negative_ids_are_padding(words):
    assert load_decoder(words)(np.array([1, -1, 2])) == " ".join(VOCABULARY[1:3])


def test_examples_are_served_on_the_loopback_interface_only(run_dir):
    with pytest.raises(ConfigError, match=r"host is '0\.0\.0\.0' and examples is 3"):
        serve(run_dir, "0.0.0.0", 0, examples=3)


def test_the_command_writes_examples_where_they_are_asked_for(run_dir, words, tmp_path, capsys):
    out = tmp_path / "report.html"
    options = ["--out", str(out), "--examples", "2", "--tokenizer", str(words), "--json"]
    assert cli.main(["report", str(run_dir), *options]) == 0
    found = json.loads(capsys.readouterr().out)["examples"]
    assert set(found["high"][0]["text"].split()) <= set(VOCABULARY)
    assert found["high"][0]["text"] in out.read_text()
    assert cli.main(["report", str(run_dir), "--out", str(out), "--examples", "99"]) == 2
    assert "examples is 99, expected an int in [1, 50]" in capsys.readouterr().err


def test_a_report_needs_no_jax(run_dir, tmp_path):
    program = """
import sys
from metagrad_filter.cli import main
main(["report", sys.argv[1], "--out", sys.argv[2], "--examples", "1"])
print(sorted({"jax", "flax", "optax", "transformers"} & set(sys.modules)))
"""
    arguments = [str(run_dir), str(tmp_path / "report.html")]
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert finished.stdout.splitlines()[-1] == "[]"
