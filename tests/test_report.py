"""Report: one file, nothing loaded from elsewhere, no string taken as markup, no field required."""

from __future__ import annotations

import copy
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from metagrad_filter.demo import figures
from metagrad_filter.demo.report import markdown_table, report_html, summary_table, write_report
from metagrad_filter.errors import ConfigError, DataError

METHODS = ("random", "low_perplexity", "domain_match", "rho_loss", "metagrad", "on_target_only")
ENDS = (3.42, 3.41, 3.372, 3.366, 3.361, 3.36)


def make_results():
    rng = np.random.default_rng(0)
    tokens = list(range(0, 600_000, 100_000))
    methods = {}
    for name, end in zip(METHODS, ENDS, strict=True):
        curve = np.linspace(3.44, end, len(tokens))[:, None] + [-0.001, 0, 0.001]
        share = (end - 3.5) / -0.15
        methods[name] = {
            "loss": curve[-1].tolist(),
            "kept_share": {"on_target": share, "off_target": 1 - share, "corrupt": 0.0},
            "recovered": (3.42 - end) / 0.06,
            "prepare_seconds": 358.2,
            "score_seconds": 0.0036,
            "curve": {"tokens": tokens, "loss": curve.tolist()},
        }
    arms = [
        {"strength": 0, "gain": 0.0, "standard_error": 0.0},
        {"strength": "inf", "gain": 0.05, "standard_error": 0.001},
    ]
    version = {
        "version": 1,
        "round": 1,
        "first_block": 0,
        "labels": 16384,
        "reliability": 0.98,
        "rank_correlation": 0.7,
        "strength": "inf",
        "gate": {"arms": arms, "chosen": "inf"},
    }
    return {
        "keep_ratio": 0.25,
        "seeds": [0, 1, 2],
        "base_loss": 3.44,
        "methods": methods,
        "scorer": {"rank_correlation": 0.7421, "label_reliability": 0.98, "form": "linear"},
        "finite_difference": {
            "rank_correlation": 0.9998,
            "relative_error": 0.006,
            "sign_agreement": 0.99,
            "entries": 256,
        },
        "versions": [version, version | {"version": 2, "first_block": 12, "strength": 1.5}],
        "stream": {
            "block_windows": 512,
            "kept_share": {
                "on_target": rng.uniform(0.9, 1, 24).tolist(),
                "off_target": rng.uniform(0, 0.05, 24).tolist(),
                "corrupt": rng.uniform(0, 0.05, 24).tolist(),
            },
            "swaps": [{"block": 0, "version": 1}, {"block": 12, "version": 2}],
        },
        "histogram": {
            "edges": [-1.0, 0.0, 1.0, 2.0],
            "on_target": [0, 4, 20],
            "off_target": [20, 4, 0],
            "corrupt": [9, 0, 0],
        },
        "scatter": {
            "label": rng.normal(size=60).tolist(),
            "score": rng.normal(size=60).tolist(),
            "class": [0, 1, 2] * 20,
        },
        "world": {"windows": 2000, "stream_windows": 1000, "window_tokens": 64, "vocab_size": 512},
        "config": {"horizon": 96, "model": {"dim": 64, "layers": 2}, "seeds": [0, 1]},
        "environment": {"python": "3.12", "cpus": 2},
        "stages": {"base_model": 134.2, "calibration": 98.0},
        "seconds": 600.0,
    }


@pytest.fixture
def results():
    return make_results()


class Page(HTMLParser):
    """Collects what a browser would load or run, and checks that every element is closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "data", "action"}:
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def svgs(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, flags=re.S)


def test_the_page_loads_nothing_and_runs_nothing(results):
    text = report_html(results)
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert not page.handlers and not {"script", "link", "iframe", "img"} & set(page.tags)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_names)


def test_the_page_has_four_figures_with_own_ids_and_resolved_references(results):
    text = report_html(results)
    assert len(svgs(text)) == 4
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    used = {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(page.ids)
    for svg in svgs(text):
        ElementTree.fromstring(svg)


def test_colours_follow_the_page(results):
    text = report_html(results)
    assert "prefers-color-scheme: dark" in text
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined
    for svg in svgs(text):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_equal_results_give_equal_pages(results):
    assert report_html(results) == report_html(copy.deepcopy(results))


def test_the_headline_has_the_main_numbers(results):
    text = Page(report_html(results)).text
    for part in ("25%", "3.3610", "3.4200", "98%", "3 paired seeds", "10 min 00 s"):
        assert part in text


def test_facts_versions_and_limits_are_on_the_page(results):
    text = Page(report_html(results)).text
    for part in (
        "0.9998",
        "0.742",
        "hard top-k: +0.0500 \u00b1 0.0010",
        "0 (random)",
        "16,384",
        "model.layers",
        "base model",
        "2 min 14 s",
        "What this does not show",
        "version 2",
    ):
        assert part in text


def test_the_limits_name_rivals_that_are_as_good_or_better(results):
    assert "An advantage over" not in report_html(results)
    results["methods"]["rho_loss"]["loss"] = [3.3605, 3.3611, 3.362]
    results["methods"]["domain_match"]["loss"] = [3.341, 3.342, 3.343]
    text = report_html(results)
    assert "An advantage over RHO-loss:" in text
    assert "The lowest loss of all: domain match" in text


def test_a_filter_that_does_not_help_is_reported_as_such(results):
    results["methods"]["metagrad"] |= {"loss": [3.43, 3.44], "recovered": -0.2}
    text = Page(report_html(results)).text
    assert "does not lower the held-out loss: 3.4350" in text and "-20%" in text


EVIL = "<script>alert('&')</script>\"'><b onload=x>$\\frac{1}{2}$"


def test_strings_are_escaped_everywhere(results):
    results["methods"][EVIL] = copy.deepcopy(results["methods"]["random"])
    results["config"][EVIL] = {EVIL: EVIL}
    results["environment"][EVIL] = EVIL
    results["scorer"]["form"] = EVIL
    results["stages"][EVIL] = 1.0
    results["world"]["windows"] = EVIL
    results["versions"][0] |= {"version": EVIL, "strength": EVIL, "labels": EVIL}
    results["stream"]["swaps"][1]["version"] = EVIL
    page = Page(report_html(results))
    assert "script" not in page.tags and not page.handlers
    assert page.text.count("alert(") >= 8


@pytest.mark.parametrize("field", [*make_results(), "all"])
def test_no_field_is_required(results, field):
    if field == "all":
        results = {}
    else:
        del results[field]
    Page(report_html(results))
    markdown_table(results)
    summary_table(results)


@pytest.mark.parametrize(
    "field", ["loss", "kept_share", "recovered", "score_seconds", "curve", "everything"]
)
@pytest.mark.parametrize("name", ["metagrad", "random", "rho_loss"])
def test_no_field_of_a_method_is_required(results, name, field):
    for key in list(results["methods"][name]) if field == "everything" else [field]:
        results["methods"][name][key] = None
    Page(report_html(results))
    assert len(markdown_table(results).splitlines()) == 2 + len(METHODS)


def test_a_method_without_a_curve_is_left_out_of_the_figure(results):
    svg = figures.loss_curves(results["methods"])
    assert svg is not None and "RHO-loss" in svg
    del results["methods"]["rho_loss"]["curve"]
    results["methods"]["metagrad"]["curve"]["loss"][2][1] = math.nan
    svg = figures.loss_curves(results["methods"])
    assert svg is not None and "RHO-loss" not in svg and "metagradient" not in svg


def test_curves_are_taken_with_seeds_first_too(results):
    turned = copy.deepcopy(results["methods"])
    for method in turned.values():
        method["curve"]["loss"] = np.transpose(method["curve"]["loss"]).tolist()
    assert figures.loss_curves(turned) == figures.loss_curves(results["methods"])


def test_a_stream_of_one_block_and_missing_values_is_drawn():
    stream = {"kept_share": {"on_target": [1.0], "corrupt": [math.nan]}, "swaps": []}
    svg = figures.kept_over_stream(stream)
    assert svg is not None and "on target" in svg


def test_smoothing_does_not_cross_a_swap_and_keeps_a_constant():
    values = np.array([0.0, 0, 0, 1, 1, 1])
    parts = [figures._smooth(values[a:b], 5) for a, b in figures._segments([0, 3, 9], 6)]
    np.testing.assert_allclose(np.concatenate(parts), values)
    np.testing.assert_allclose(figures._smooth(np.array([1, math.nan, 3.0]), 3), [1, 2, 3])


def test_markdown_has_one_row_per_method_with_its_numbers(results):
    results["methods"]["a|b"] = {"loss": [3.4]}
    lines = markdown_table(results).splitlines()
    assert lines[0].startswith("| Selection | Held-out loss")
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2].startswith("| random | 3.4200 \u00b1 0.0010 | 0.00 | ")
    assert lines[6].startswith("| **metagradient** | **3.3610 \u00b1 0.0010** | **0.98** |")
    assert lines[8] == "| a\\|b | 3.4000 | \u2013 | \u2013 | \u2013 |"
    assert len(lines) == 9


def test_the_terminal_table_fits_80_columns_and_reads_no_markup(results):
    results["methods"]["[red]name"] = {"loss": [3.4]}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(results))
    text = console.export_text()
    assert "[red]name" in text and "\u2026" not in text
    row = next(line for line in text.splitlines() if "metagradient" in line)
    assert re.search(r"3\.3610 \u00b1 0\.0010 +0\.98 +\d\.\d+/\d\.\d+/\d\.\d+ +358\+0\.004", row)


def test_the_report_is_written_as_a_whole(results, tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write_report(results, path) == path
    assert path.read_text(encoding="utf-8") == report_html(results)
    write_report({}, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(DataError, match="cannot be written"):
        write_report(results, path / "below-a-file.html")


def test_without_matplotlib_the_extra_is_named(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"metagrad-filter\[demo\]"):
        report_html(results)
