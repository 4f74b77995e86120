"""Page: one file that loads nothing, runs only its own two scripts, and takes no text as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources

import pytest
from example_run import make_run
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.monitor.page import live_html, report_html, view_json, write_run_report
from metagrad_filter.monitor.sinks import METRICS, PREFIX, Prometheus
from metagrad_filter.monitor.view import run_view

ASSETS = resources.files("metagrad_filter") / "monitor" / "assets"
EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>{{view}}\u2028&\"'"


class Page(HTMLParser):
    """Collects elements, what a browser would load, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.contents.append((self.elements[-1][0], data))

    def view(self):
        return json.loads(self.contents[1][1])


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return run_view(make_run(tmp_path_factory.mktemp("run"), records=16))


def test_the_page_holds_the_view_and_loads_nothing(view):
    page = Page(report_html(view))
    assert page.view() == view
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "base", "form"}
        assert not {"src", "href", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert [kind for kind, _ in page.contents] == ["style", "script", "script", "script"]
    assert not re.search(r"url\(|@import", page.contents[0][1])


@pytest.mark.parametrize("make", [report_html, live_html])
def test_the_policy_names_exactly_the_own_scripts_and_style(view, make):
    page = Page(make(view))
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"

    def hashes(indices):
        digests = [hashlib.sha256(page.contents[i][1].encode()).digest() for i in indices]
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

    assert rules["script-src"] == hashes([2, 3]) and rules["style-src"] == hashes([0])
    assert rules.get("connect-src") == ("'self'" if make is live_html else None)


def test_text_of_a_run_never_becomes_markup(view):
    evil = json.loads(json.dumps(view))
    evil["rounds"][2]["reason"] = evil["run"] = EVIL
    evil["filters"][EVIL] = evil["filters"].pop("train")
    evil["filters"][EVIL]["groups"] = {EVIL: [{"label": EVIL, "seen": 1, "kept": 1, "share": None}]}
    example = {"score": 1.0, "share": 1.0, "text": EVIL}
    evil["examples"] = {"version": 1, "origin": EVIL, "windows": 1, "high": [example], "low": []}
    evil["filters"][EVIL]["alarms"]["events"][0] |= {"text": EVIL, "kind": EVIL}
    evil["checks"][0]["kind"] = evil["versions"][0]["fallback"] = EVIL
    page, plain_page = Page(report_html(evil)), Page(report_html(view))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain_page.elements]
    assert page.view() == evil


@given(st.text())
def test_json_in_a_script_has_nothing_that_could_end_it(text):
    encoded = view_json({"text": text})
    assert json.loads(encoded)["text"] == text.encode(errors="replace").decode()
    assert not set(encoded) & set("<>&\u2028\u2029\n")


def test_numbers_that_are_not_finite_become_null():
    assert view_json({"a": [float("nan"), float("inf"), 1.5]}) == '{"a":[null,null,1.5]}'


def test_the_script_never_writes_markup():
    script = (ASSETS / "page.js").read_text()
    for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert risky not in script


@pytest.mark.parametrize("name", ["page.css", "page.js", "uPlot.iife.min.js", "uPlot.min.css"])
def test_assets_survive_being_inlined(name):
    # A browser hashes what it parsed: no carriage returns, no end of the element inside.
    data = (ASSETS / name).read_bytes()
    assert b"\r" not in data and b"\0" not in data
    assert not re.search(rb"</(script|style)|<!--|<script", data)


def test_the_library_on_the_page_comes_with_its_licence():
    page = report_html({})
    assert "uPlot (v1.6.32)" in page
    licence = (ASSETS / "uPlot.LICENSE.txt").read_text()
    assert "Permission is hereby granted" in licence and licence in page and "--" not in licence


def test_both_colour_schemes_define_the_same_colours():
    style = (ASSETS / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.S)
    names = set(re.findall(r"(--\w+):", light))
    assert names == set(re.findall(r"(--\w+):", dark))
    used = set(re.findall(r"--[a-z]+", style + (ASSETS / "page.js").read_text()))
    assert used <= names


def test_a_report_is_written_as_a_whole(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    path, view = write_run_report(run_dir, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == report_html(view)
    write_run_report(run_dir, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(DataError, match="cannot be written"):
        write_run_report(run_dir, path / "below-a-file.html")
    with pytest.raises(ConfigError, match="not a directory"):
        write_run_report(tmp_path / "nothing", path)


def exported() -> dict[str, set[str]]:
    """Names of all samples that the exporter publishes, without prefix, and their labels."""
    registry = CollectorRegistry()
    sink = Prometheus(registry)
    for name, (_, labels) in METRICS.items():
        sink.write(0, {name: 1.0}, dict.fromkeys(labels, "x"))
    sink.observe_scores([1] * 64)
    return {
        sample.name.removeprefix(PREFIX): set(sample.labels)
        for family in registry.collect()
        for sample in family.samples
    }


def test_the_grafana_dashboard_asks_only_for_names_and_labels_that_are_exported():
    names_and_labels = exported()
    dashboard = json.loads((ASSETS / "grafana.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked += [a["expr"] for a in dashboard["annotations"]["list"]]
    for expression in asked:
        names = re.findall(r"metagrad_filter_(\w+)\{", expression)
        assert names and set(names) <= names_and_labels.keys(), expression
        labels = set(re.findall(r"[{,](\w+)[=!]", expression)) - {"job"}
        for grouped in re.findall(r"by \((\w+)\)", expression):
            labels.add(grouped)
        assert all(labels <= names_and_labels[name] for name in names), expression
    assert len(dashboard["panels"]) >= 16


def test_the_panels_of_the_dashboard_do_not_overlap():
    panels = json.loads((ASSETS / "grafana.json").read_text())["panels"]
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
