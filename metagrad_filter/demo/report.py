"""The demo's results as a page, a terminal table and a Markdown table.

Answers "what came out, and what does it not show?". The only input is the dictionary that the demo
stores as `results.json`, so a report can be written again at any time. The page is one HTML file
that needs no network: figures are inline SVG, styles are inside, and it follows the reader's light
or dark setting. About one second. Read next: `metagrad_filter.demo.figures`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from metagrad_filter.demo import figures
from metagrad_filter.errors import DataError
from metagrad_filter.files import replace_file

Results = Mapping[str, Any]

_DASH = "\u2013"
_COLUMNS = (
    "Selection",
    "Held-out loss (nats/token)",
    "Gain recovered",
    "Kept on / off / corrupt",
    "Prepare + score (s)",
)
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
header p.over { margin: 0; color: var(--muted); font-size: .86rem; letter-spacing: .02em; }
h1 { font-size: clamp(1.45rem, 3.4vw, 2.15rem); line-height: 1.25; letter-spacing: -.015em;
  font-weight: 650; max-width: 34em; margin: .35em 0 .5em; text-wrap: pretty; }
h1 b { color: var(--metagrad); font-weight: 650; white-space: nowrap; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 2.6em 0 .7em; }
h3 { font-size: .98rem; margin: 0 0 .5em; line-height: 1.35; }
p, li { max-width: 46em; } p.note, figcaption, .small { color: var(--muted); font-size: .88rem; }
header p { margin: .3em 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .6em .9em; border-bottom: 1px solid var(--rule);
  vertical-align: middle; }
th { font-size: .8rem; color: var(--muted); font-weight: 550; vertical-align: bottom; }
th:first-child, td:first-child, th.left, td.left { text-align: left; }
tr:last-child td { border-bottom: 0; } tr.us td { font-weight: 650; }
td .small { font-weight: 400; white-space: nowrap; }
.dot { display: inline-block; width: .72em; height: .72em; border-radius: 50%;
  margin-right: .55em; background: var(--c); }
.bar { display: flex; height: 9px; border-radius: 5px; overflow: hidden; background: var(--rule);
  margin: 2px 0 5px; min-width: 130px; gap: 1px; }
.bar i { background: var(--c); }
.key { display: flex; flex-wrap: wrap; gap: .2em 1.3em; margin: .7em 0 0; padding: 0; }
.key span { color: var(--muted); font-size: .88rem; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px),
  1fr)); }
.facts { display: grid; gap: 18px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
figure, .facts > .card { margin: 0; padding: 18px 20px 16px; min-width: 0; }
figure .key { margin: 0 0 .3em; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit !important; }
dl { margin: 0; display: grid; grid-template-columns: auto auto; gap: .3em 1em;
  font-variant-numeric: tabular-nums; font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.versions td, .versions th { font-size: .92rem; padding: .45em .8em; white-space: nowrap; }
.scroll { overflow-x: auto; }
footer { margin-top: 3em; color: var(--muted); font-size: .84rem; }
@media (max-width: 680px) {
  main { padding: 24px 14px 48px; } figure, .facts > .card { padding: 14px 12px 12px; }
  .methods thead { display: none; }
  .methods tr { display: block; padding: .8em 1em; border-bottom: 1px solid var(--rule); }
  .methods tr:last-child { border: 0; }
  .methods td { display: flex; justify-content: space-between; gap: .1em 1em; padding: .12em 0;
    border: 0; align-items: baseline; }
  .methods td:first-child { font-weight: 650; justify-content: flex-start; gap: 0; }
  .methods td[data-name]::before { content: attr(data-name); color: var(--muted);
    font-size: .86rem; font-weight: 400; text-align: left; }
  .methods td.left { flex-wrap: wrap; } .methods td.left > div { display: contents; }
  .methods .bar { order: 3; flex: 1 1 100%; margin: 4px 0; }
}
@media print { .card { break-inside: avoid; } main { padding: 0; } }
"""


def write_report(results: Results, path: str | os.PathLike[str]) -> Path:
    """Writes the page; an existing file is replaced as a whole.

    Args:
      results: the demo's results; parts that are missing are left out of the page.
      path: file to write.

    Returns:
      `path`.

    Raises:
      ConfigError: matplotlib is not installed.
      DataError: the file cannot be written.
    """
    target = Path(path)
    content = report_html(results).encode()
    try:
        replace_file(target, content, mode=0o644)  # a report is there to be shown
    except OSError as error:
        raise DataError(
            f"The report {target} cannot be written ({error}). Pass a path that can."
        ) from error
    return target


def report_html(results: Results) -> str:
    """Returns the whole page as text; see `write_report`."""
    light = f"--page: #f7f8fa; --card: #ffffff; {figures.css_variables(dark=False)}"
    dark = f"--page: #14171c; --card: #1c2027; {figures.css_variables(dark=True)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>MetaGrad-Distill: demo report</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_STYLE}</style>
</head>
<body>
<main>
{_header(results)}
<h2>Selections compared</h2>
{_methods_table(results)}
<h2>How it went</h2>
{_figures(results)}
{_versions(results)}
<h2>Facts</h2>
{_facts(results)}
<h2>What this does not show</h2>
{_limits(results)}
<footer>Written by <code>metagrad-filter demo</code> from results.json.</footer>
</main>
</body>
</html>
"""


def markdown_table(results: Results) -> str:
    """Returns the comparison as a Markdown table, one line per method, ending in a newline."""
    rows = [_COLUMNS, ("---", "---:", "---:", "---:", "---:")]
    for name, method in _methods(results):
        cells = [figures.method_look(name).name, *_cells(method)]
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        rows.append(tuple(f"**{c}**" if name == "metagrad" else c for c in cells))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary_table(results: Results) -> Table:
    """Returns the comparison as a table for the terminal."""
    title = "Training on the selected windows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(_COLUMNS):
        # Units on a second line: the table then fits 80 columns.
        heading = column.replace(" (", "\n(").replace(" / ", "/")
        for start in ("Gain ", "Kept ", "Prepare "):
            heading = heading.replace(start, f"{start.rstrip()}\n").replace("+ score", "+score")
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for name, method in _methods(results):
        style = "bold" if name == "metagrad" else ""
        # Text, not str: a name in square brackets is not markup.
        *shown, seconds = (figures.method_look(name).name, *_cells(method))
        shown[-1] = shown[-1].replace(" / ", "/")
        cells = [Text(cell) for cell in (*shown, seconds.replace(" + ", "+"))]
        table.add_row(*cells, style=style)
    return table


# ---- parts of the page


def _header(results: Results) -> str:
    methods = dict(_methods(results))
    ours, random, ceiling = (
        _mean(methods.get(name, {}).get("loss"))
        for name in ("metagrad", "random", "on_target_only")
    )
    keep = _number(results.get("keep_ratio"), ".0%")
    if ours is None or random is None:
        headline = "Results of the metagradient filter."
    else:
        verb = "lowers" if ours < random else "does not lower"
        headline = (
            f"Training on the {keep} of the stream that the metagradient filter keeps {verb}"
            f" the held-out loss: <b>{ours:.4f}</b> against {random:.4f} nats/token for a random"
            f" {keep}"
        )
        recovered = methods["metagrad"].get("recovered")
        if ceiling is not None and _finite(recovered):
            headline += (
                f", <b>{recovered:.0%}</b> of what choosing by the true classes gains"
                f" ({ceiling:.4f})."
            )
        else:
            headline += "."
    world = results.get("world") or {}
    sentences = []
    if world:
        sentences.append(
            f"The stream holds {_count(world.get('stream_windows'))} windows of"
            f" {_count(world.get('window_tokens'))} tokens: 40% PubMed abstracts (the target),"
            " 40% BBC news, 20% token-shuffled abstracts."
        )
    if _finite(results.get("base_loss")):
        sentences.append(f"Every run continues one base model at {results['base_loss']:.4f}.")
    share = (methods.get("metagrad", {}).get("kept_share") or {}).get("on_target")
    if _finite(share):
        sentences.append(
            f"Of what the filter keeps, {share:.1%} is on target; it never sees a class."
        )
    over = "MetaGrad-Distill demo"
    if _finite(results.get("seconds")):
        over += f" \u00b7 {_duration(results['seconds'])} in all"
    seeds = len(results.get("seeds") or [])
    if seeds:
        over += f" \u00b7 {seeds} paired seed{'s' if seeds > 1 else ''}"
    return (
        f'<header><p class="over">{escape(over)}</p><h1>{headline}</h1>'
        f"<p>{escape(' '.join(sentences))}</p></header>"
    )


def _methods_table(results: Results) -> str:
    rows = []
    for name, method in _methods(results):
        loss, recovered, _, seconds = (escape(cell) for cell in _cells(method))
        rows.append(
            f"<tr{' class=us' if name == 'metagrad' else ''}>"
            f"<td>{_dot(name)}{escape(figures.method_look(name).name)}</td>"
            f'<td data-name="held-out loss, nats/token">{loss}</td>'
            f'<td data-name="gain recovered">{recovered}</td>'
            f'<td class="left" data-name="kept on / off / corrupt">'
            f"{_share_bar(method.get('kept_share'))}</td>"
            f'<td data-name="prepare + score, seconds">{seconds}</td></tr>'
        )
    head = (
        "<th>Selection</th><th>Held-out loss,<br>nats/token</th><th>Gain recovered</th>"
        '<th class="left">Kept windows by class</th><th>Prepare + score,<br>seconds</th>'
    )
    return (
        f'<div class="card"><table class="methods"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_key(figures.CLASSES)}"
        '<p class="note">Loss: mean over seeds \u00b1 standard deviation; lower is better.'
        " Gain recovered: the share of the distance from random to on-target only. On-target only"
        " reads the true classes and is here as a yardstick: no filter has them. Prepare: seconds"
        " for what has to be there first (calibration rounds, a tuned reference model), beside"
        " other work. Score: seconds to score the whole stream once.</p>"
    )


def _figures(results: Results) -> str:
    rank = (results.get("scorer") or {}).get("rank_correlation")
    agreement = f": rank correlation {rank:.3f}" if _finite(rank) else ""
    classes = _key(figures.CLASSES)
    parts = (
        (
            "Held-out loss while training",
            "",
            figures.loss_curves(dict(_methods(results))),
            "Line: mean over seeds. Band: least to greatest. All runs see as many tokens.",
        ),
        (
            "What the filter keeps, block by block",
            "",
            figures.kept_over_stream(results.get("stream") or {}),
            "Thin: each block. Thick: moving average that never crosses a change of version.",
        ),
        (
            "Scores of the stream by class",
            classes,
            figures.score_histogram(results.get("histogram") or {}),
            "Every block keeps its best windows, so the order counts and not the scale.",
        ),
        (
            f"Scorer against metagradient{escape(agreement)}",
            classes,
            figures.score_against_label(results.get("scatter") or {}),
            "The diagonal is perfect agreement. Percentiles, since labels have extreme tails.",
        ),
    )
    return _grid(parts)


def _grid(parts: Iterable[tuple[str, str, str | None, str]]) -> str:
    """Cards of the figures that were drawn: title, key, drawing and caption of each."""
    drawn = [
        f'<figure class="card"><h3>{title}</h3>{key}{svg}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for title, key, svg, caption in parts
        if svg
    ]
    return f'<div class="grid">{"".join(drawn)}</div>' if drawn else "<p>No figure.</p>"


def _versions(results: Results) -> str:
    versions = results.get("versions") or []
    if not versions:
        return ""
    rows = []
    for version in versions:
        gate = version.get("gate") or {}
        arms = [
            f"{escape(_strength(arm.get('strength')))}: {_number(arm.get('gain'), '+.4f')}"
            f" \u00b1 {_number(arm.get('standard_error'), '.4f')}"
            for arm in gate.get("arms") or []
        ]
        rows.append(
            f"<tr><td>{escape(str(version.get('version', _DASH)))}</td>"
            f"<td>{escape(_count(version.get('first_block')))}</td>"
            f"<td>{escape(_count(version.get('labels')))}</td>"
            f"<td>{_number(version.get('reliability'), '.3f')}</td>"
            f"<td>{_number(version.get('rank_correlation'), '.3f')}</td>"
            f"<td>{escape(_strength(version.get('strength')))}</td>"
            f'<td class="left">{"<br>".join(arms) or _DASH}</td></tr>'
        )
    head = (
        "<th>Version</th><th>First block</th><th>Labels</th><th>Label reliability</th>"
        '<th>Rank correlation</th><th>Strength</th><th class="left">Gate: gain over random</th>'
    )
    return (
        '<h2>Published versions</h2><div class="card scroll"><table class="versions">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">The gate trains short paired runs on a split of its own and publishes the'
        " strength that gains most there and breaks no guard, none included. Gains in the target's"
        " unit \u00b1 standard error.</p>"
    )


def _facts(results: Results) -> str:
    scorer = results.get("scorer") or {}
    check = results.get("finite_difference") or {}
    world = results.get("world") or {}
    stages = results.get("stages") or {}
    groups: list[tuple[str, Iterable[tuple[str, str]]]] = [
        (
            "Metagradient against finite differences",
            [
                ("rank correlation", _number(check.get("rank_correlation"), ".4f")),
                ("relative error", _number(check.get("relative_error"), ".2%")),
                ("sign agreement", _number(check.get("sign_agreement"), ".1%")),
                ("entries compared", _count(check.get("entries"))),
            ]
            if check
            else [],
        ),
        (
            "Labels and scorer",
            [
                ("label reliability", _number(scorer.get("label_reliability"), ".3f")),
                ("rank correlation with labels", _number(scorer.get("rank_correlation"), ".3f")),
                ("form", str(scorer.get("form", _DASH))),
            ]
            if scorer
            else [],
        ),
        ("World", [(_words(name), _count(value)) for name, value in world.items()]),
        ("Time by stage", [(_words(name), _duration(value)) for name, value in stages.items()]),
        ("Configuration", _flat(results.get("config") or {})),
        ("Machine and software", _flat(results.get("environment") or {})),
    ]
    cards = [
        f'<div class="card"><h3>{escape(title)}</h3><dl>'
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
        + "</dl></div>"
        for title, facts in ((title, list(facts)) for title, facts in groups)
        if facts
    ]
    return f'<div class="facts">{"".join(cards)}</div>'


def _limits(results: Results) -> str:
    methods = dict(_methods(results))
    ours = methods.get("metagrad", {}).get("loss")
    seeds = len(results.get("seeds") or [])
    points = []
    equal, better = [], []
    for name in ("low_perplexity", "domain_match", "rho_loss"):
        loss = methods.get(name, {}).get("loss")
        mean, reference = _mean(loss), _mean(ours)
        if mean is None or reference is None:
            continue
        margin = 2 * max(_deviation(loss) or 0.0, _deviation(ours) or 0.0)
        if mean <= reference + margin:
            (better if mean < reference - margin else equal).append(figures.method_look(name).name)
    if better:
        points.append(
            f"The lowest loss of all: {_listed(better)} reaches a lower one here, by more than"
            " twice the standard deviation over seeds."
        )
    if equal:
        points.append(
            f"An advantage over {_listed(equal)}: the losses differ by less than twice the standard"
            " deviation over seeds. Here the target is one domain, its vocabulary alone gives it"
            " away, and a sample of it is at hand. Worlds in which what helps does not look like"
            " the target are not part of this demo."
        )
    points += [
        "Anything about scale. The model is a small decoder trained from scratch, the windows are"
        " short, and one pair of domains was tried.",
        f"The variation between worlds. The {seeds or 'few'} seeds repeat the training runs;"
        " data, base model and calibration are the same in all of them, so the spread says"
        " nothing about another draw of those.",
        "A bound. On-target only knows the classes but not which of its windows are better; a"
        " filter can pass it, and a share above 100% is possible.",
        "That metagradients are cheap. Calibration is the dearest preparation in the table, and at"
        " this size it costs more than the training it steers; it pays where one round serves"
        " many steps. Domain match fits and scores in one call.",
        "Natural corruption. The corrupt class is shuffled tokens, far easier to recognise than"
        " broken web text.",
    ]
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return f"<ul>{items}</ul>"


def _key(looks: Mapping[str, figures.Look]) -> str:
    chips = (f"<span>{_dot(name)}{escape(look.name)}</span>" for name, look in looks.items())
    return f'<div class="key">{"".join(chips)}</div>'


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _dot(name: str) -> str:
    return f'<i class="dot" style="--c:{figures.css_colour(name)}"></i>'


def _share_bar(shares: Any) -> str:
    if not isinstance(shares, Mapping):
        return _DASH
    pieces = "".join(
        f'<i style="--c:{figures.css_colour(name)};width:{100 * shares[name]:.2f}%"></i>'
        for name in figures.CLASSES
        if _finite(shares.get(name)) and shares[name] > 0
    )
    return f'<div><div class="bar">{pieces}</div><div class="small">{_shares(shares)}</div></div>'


# ---- numbers as text


def _methods(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the methods in the order of the figures, unknown ones last."""
    methods = results.get("methods") or {}
    order = [name for name in figures.METHODS if name in methods]
    order += [name for name in methods if name not in figures.METHODS]
    return [(name, methods[name]) for name in order]


def _cells(method: Mapping[str, Any]) -> tuple[str, str, str, str]:
    mean, deviation = _mean(method.get("loss")), _deviation(method.get("loss"))
    loss = _DASH if mean is None else f"{mean:.4f}"
    if deviation is not None:
        loss += f" \u00b1 {deviation:.4f}"
    shares = method.get("kept_share")
    return (
        loss,
        _number(method.get("recovered"), ".2f"),
        _shares(shares) if isinstance(shares, Mapping) else _DASH,
        _seconds(method),
    )


def _seconds(method: Mapping[str, Any]) -> str:
    """Seconds to get ready (calibration, a reference model) and to score the stream."""
    prepare, score = method.get("prepare_seconds"), method.get("score_seconds")
    if not _finite(score):
        return _DASH
    scored = _number(score, ".3f" if float(score or 0) < 0.1 else ".1f")
    return f"{_number(prepare, '.0f')} + {scored}" if _finite(prepare) else scored


def _shares(shares: Mapping[str, Any]) -> str:
    return " / ".join(_number(shares.get(name), ".3f") for name in figures.CLASSES)


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _number(value: Any, form: str) -> str:
    return format(value, form) if _finite(value) else _DASH


def _count(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return ", ".join(f"{k} {v}" for k, v in _flat(value)) if value else _DASH
    if _finite(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return _DASH if value is None else str(value)


def _values(loss: Any) -> list[float]:
    values = loss if isinstance(loss, (list, tuple)) else [loss]
    return [float(value) for value in values if _finite(value)]


def _mean(loss: Any) -> float | None:
    values = _values(loss)
    return sum(values) / len(values) if values else None


def _deviation(loss: Any) -> float | None:
    values = _values(loss)
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _strength(value: Any) -> str:
    """Names a Gumbel top-k strength: infinite is hard top-k, zero a random choice."""
    if value in ("inf", math.inf):
        return "hard top-k"
    if _finite(value):
        return f"{value:g}" if value else "0 (random)"
    return _DASH if value is None else str(value)


def _duration(seconds: Any) -> str:
    if not _finite(seconds):
        return _DASH
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Lists nested configuration as dotted names and texts."""
    if isinstance(values, (list, tuple)):
        values = dict(enumerate(values))
    facts: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            facts += _flat(value, f"{prefix}{_words(name)}.")
        elif isinstance(value, (list, tuple)):
            facts.append((prefix + _words(name), ", ".join(map(str, value)) or _DASH))
        else:
            facts.append((prefix + _words(name), _DASH if value is None else str(value)))
    return facts
