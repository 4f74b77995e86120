"""The results of a run on time series as a page, a terminal table and a Markdown table.

Answers "what came out, and what does it not show?" for `metagrad-filter demo --kind series`, with
the page, the figures and the style of the text demo's report. The only input is the dictionary that
the demo stores as `results.json`. Read next: `metagrad_filter.demo.report`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from metagrad_filter.demo import figures
from metagrad_filter.demo import report as page
from metagrad_filter.errors import DataError
from metagrad_filter.files import replace_file

Results = Mapping[str, Any]

_COLUMNS = (
    "Selection",
    "Rare-event error (squared deviations)",
    "Against random",
    "Usual NLL (nats/value)",
    "90% coverage",
    "Kept usual / rare / corrupt",
    "Prepare + score (s)",
)


def write_series_report(results: Results, path: str | os.PathLike[str]) -> Path:
    """Writes the page; an existing file is replaced as a whole.

    Raises:
      ConfigError: matplotlib is not installed.
      DataError: the file cannot be written.
    """
    target = Path(path)
    try:
        replace_file(target, series_report_html(results).encode(), mode=0o644)
    except OSError as error:
        raise DataError(
            f"The report {target} cannot be written ({error}). Pass a path that can."
        ) from error
    return target


def series_report_html(results: Results) -> str:
    """Returns the whole page as text; see `write_series_report`."""
    light = f"--page: #f7f8fa; --card: #ffffff; {figures.css_variables(dark=False)}"
    dark = f"--page: #14171c; --card: #1c2027; {figures.css_variables(dark=True)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>MetaGrad-Distill: demo report, time series</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{page._STYLE}</style>
</head>
<body>
<main>
{_header(results)}
<h2>Selections compared</h2>
{_methods_table(results)}
<h2>How it went</h2>
{_figures(results)}
{_auroc_table(results)}
{page._versions(results)}
<h2>Facts</h2>
{page._facts(results)}
<h2>What this does not show</h2>
{_limits(results)}
<footer>Written by <code>metagrad-filter demo --kind series</code> from results.json.</footer>
</main>
</body>
</html>
"""


def series_markdown_table(results: Results) -> str:
    """Returns the comparison as a Markdown table, one line per method, ending in a newline."""
    rows = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1))]
    for name, method in _methods(results):
        cells = [figures.method_look(name).name, *_cells(method)]
        rows.append(tuple(f"**{c}**" if name == "metagrad" else c for c in cells))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def series_summary_table(results: Results) -> Table:
    """Returns the comparison as a table for the terminal."""
    title = "Training on the selected windows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    short = ("Selection", "Rare\nerror", "Against\nrandom", "Usual\nNLL", "90%\ncoverage")
    for i, heading in enumerate((*short, "Kept usual/\nrare/corrupt")):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for name, method in _methods(results):
        *shown, _ = (figures.method_look(name).name, *_cells(method, deviations=False))
        shown[-1] = shown[-1].replace(" / ", "/")
        table.add_row(*map(Text, shown), style="bold" if name == "metagrad" else "")
    return table


def _methods(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the methods in the order of the figures, unknown ones last."""
    methods = results.get("methods") or {}
    order = [name for name in figures.SERIES_METHODS if name in methods]
    order += [name for name in methods if name not in figures.SERIES_METHODS]
    return [(name, methods[name]) for name in order]


def _cells(method: Mapping[str, Any], *, deviations: bool = True) -> tuple[str, ...]:
    shares = method.get("kept_share")
    return (
        _spread(method.get("rare_error"), ".4f", deviations),
        page._number(method.get("rare_change"), "+.1%"),
        _spread(method.get("normal_nll"), ".4f", deviations),
        _spread(method.get("coverage"), ".3f", deviations),
        _shares(shares) if isinstance(shares, Mapping) else page._DASH,
        page._seconds(method),
    )


def _spread(values: Any, form: str, deviations: bool) -> str:
    mean, deviation = page._mean(values), page._deviation(values)
    if mean is None:
        return page._DASH
    if deviation is None or not deviations:
        return format(mean, form)
    return f"{format(mean, form)} \u00b1 {format(deviation, form)}"


def _shares(shares: Mapping[str, Any]) -> str:
    return " / ".join(page._number(shares.get(name), ".3f") for name in figures.SERIES_CLASSES)


def _header(results: Results) -> str:
    methods = dict(_methods(results))
    ours = methods.get("metagrad", {})
    mine = page._mean(ours.get("rare_error"))
    plain = page._mean(methods.get("random", {}).get("rare_error"))
    keep = page._number(results.get("keep_ratio"), ".0%")
    if mine is None or plain is None:
        headline = "Results of the metagradient filter on time series."
    else:
        verb = "lowers" if mine < plain else "does not lower"
        headline = (
            f"Training on the {keep} of the stream that the metagradient filter keeps {verb} the"
            f" error at rare events: <b>{mine:.3f}</b> against {plain:.3f} for a random {keep}"
            f" (<b>{mine / plain - 1:+.0%}</b>)."
        )
    sentences = [
        "Atlantic storms, six-hourly; the rare event is rapid intensification (+30 knots in 24"
        " hours). The filter sees values only, never a class."
    ]
    auroc = results.get("auroc") or {}
    found = {name: (auroc.get(name) or {}).get("all") for name in ("metagrad", "surprise")}
    if all(page._finite(value) for value in found.values()):
        sentences.append(
            f"It ranks a rare window above a broken one in {found['metagrad']:.0%} of pairs;"
            f" surprise does in {found['surprise']:.0%}."
        )
    nll = {n: page._mean(methods.get(n, {}).get("normal_nll")) for n in ("metagrad", "random")}
    if nll["metagrad"] is not None and nll["random"] is not None:
        sentences.append(
            f"Usual weather: {nll['metagrad']:+.3f} nats a value against {nll['random']:+.3f} for"
            " random."
        )
    over = "MetaGrad-Distill demo, time series"
    if page._finite(results.get("seconds")):
        over += f" \u00b7 {page._duration(results['seconds'])} in all"
    seeds = len(results.get("seeds") or [])
    if seeds:
        over += f" \u00b7 {seeds} paired seed{'s' if seeds > 1 else ''}"
    return (
        f'<header><p class="over">{escape(over)}</p><h1>{headline}</h1>'
        f"<p>{escape(' '.join(sentences))}</p></header>"
    )


def _methods_table(results: Results) -> str:
    names = ("rare-event error", "against random", "usual NLL", "90% coverage")
    rows = []
    for name, method in _methods(results):
        *numbers, _, seconds = (escape(cell) for cell in _cells(method))
        cells = "".join(f'<td data-name="{n}">{c}</td>' for n, c in zip(names, numbers))
        rows.append(
            f"<tr{' class=us' if name == 'metagrad' else ''}>"
            f"<td>{page._dot(name)}{escape(figures.method_look(name).name)}</td>{cells}"
            f'<td class="left" data-name="kept usual / rare / corrupt">'
            f"{_share_bar(method.get('kept_share'))}</td>"
            f'<td data-name="prepare + score, seconds">{seconds}</td></tr>'
        )
    head = (
        "<th>Selection</th><th>Rare-event error</th><th>Against random</th>"
        "<th>Usual NLL,<br>nats/value</th><th>90% coverage</th>"
        '<th class="left">Kept windows by class</th><th>Prepare + score,<br>seconds</th>'
    )
    return (
        f'<div class="card scroll"><table class="methods"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{page._key(figures.SERIES_CLASSES)}"
        '<p class="note">Measured on storms that no training and no filter has seen: mean over'
        " seeds \u00b1 standard deviation. Rare-event error: mean squared error of the wind at"
        " steps of rapid intensification, in squared standard deviations. Usual NLL and coverage:"
        " of windows without the event. Rare oracle reads the true classes (all rare windows, then"
        " usual ones) and is here as a yardstick: no filter has them.</p>"
    )


def _figures(results: Results) -> str:
    methods = dict(_methods(results))
    rank = (results.get("scorer") or {}).get("rank_correlation")
    agreement = f": rank correlation {rank:.3f}" if page._finite(rank) else ""
    classes = page._key(figures.SERIES_CLASSES)
    parts = (
        (
            "Error at rare events while training",
            "",
            _curves(methods, "rare_error", "rare-event error"),
            "Line: mean over seeds. Band: least to greatest. All runs see as many windows.",
        ),
        (
            "Loss of usual windows while training",
            "",
            _curves(methods, "normal_nll", "nats per value"),
            "What a narrow target must not cost.",
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
            "The order within a block decides, softly at a finite strength, and never the scale.",
        ),
        (
            f"Scorer against metagradient{escape(agreement)}",
            classes,
            figures.score_against_label(results.get("scatter") or {}),
            "The diagonal is perfect agreement. Percentiles, since labels have extreme tails.",
        ),
    )
    return page._grid(parts)


def _curves(methods: Mapping[str, Any], measure: str, unit: str) -> str | None:
    curves = {}
    for name, method in methods.items():
        curve = method.get("curve") or {}
        if curve.get("windows") and curve.get(measure):
            curves[name] = {"curve": {"tokens": curve["windows"], "loss": curve[measure]}}
    words = measure.replace("_", " ")
    return figures.loss_curves(
        curves,
        x="training windows",
        y=unit,
        title=f"{words} against training windows for each method",
        name=measure.replace("_", "-"),
    )


def _auroc_table(results: Results) -> str:
    found = results.get("auroc") or {}
    shown = [name for name in ("metagrad", "surprise", "rho_loss") if name in found]
    if not shown:
        return ""
    kinds = [name for name in found[shown[0]] if name != "all"]
    rows = [("all of them", [page._number(found[name].get("all"), ".3f") for name in shown])]
    for kind in kinds:
        cells = []
        for name in shown:
            values = (found[name].get(kind) or {}).values()
            cells.append(" / ".join(page._number(value, ".2f") for value in values))
        rows.append((kind, cells))
    severities = ", ".join(found[shown[0]][kinds[0]]) if kinds else ""
    head = "".join(f"<th>{escape(figures.method_look(name).name)}</th>" for name in shown)
    body = "".join(
        f"<tr><td>{escape(kind)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"
        for kind, cells in rows
    )
    return (
        "<h2>Rare above broken</h2>"
        '<div class="card scroll"><table class="versions"><thead>'
        f"<tr><th>Broken by</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="note">How often a rare window scores above a broken one (area under the curve,'
        f" 0.5 is chance), at severities {escape(severities)}.</p>"
    )


def _share_bar(shares: Any) -> str:
    if not isinstance(shares, Mapping):
        return page._DASH
    pieces = "".join(
        f'<i style="--c:{figures.css_colour(name)};width:{100 * shares[name]:.2f}%"></i>'
        for name in figures.SERIES_CLASSES
        if page._finite(shares.get(name)) and shares[name] > 0
    )
    return f'<div><div class="bar">{pieces}</div><div class="small">{_shares(shares)}</div></div>'


def _limits(results: Results) -> str:
    methods = dict(_methods(results))
    ours = methods.get("metagrad", {}).get("rare_error")
    points = []
    for name in ("rho_loss", "loss_band", "low_loss", "surprise"):
        theirs = methods.get(name, {}).get("rare_error")
        mean, mine = page._mean(theirs), page._mean(ours)
        if mean is None or mine is None:
            continue
        margin = 2 * max(page._deviation(theirs) or 0.0, page._deviation(ours) or 0.0)
        if mean <= mine + margin:
            points.append(
                f"An advantage over {figures.method_look(name).name} at rare events: the errors"
                " differ by less than twice the standard deviation over seeds, or its is lower."
            )
    auroc = results.get("auroc") or {}
    kinds = auroc.get("metagrad") or {}
    weak = [
        kind
        for kind, values in kinds.items()
        if isinstance(values, Mapping)
        and any(page._finite(value) and value < 0.6 for value in values.values())
    ]
    if weak:
        points.append(
            f"That every fault is told from a rare event: for {page._listed(weak)} the scorer ranks"
            " little better than chance at some severity."
        )
    points += [
        "Anything about scale. The model is a small patch transformer trained from scratch, and"
        " one kind of series was tried.",
        "The variation between worlds. Seeds reorder the stream; storms, base model and"
        " calibration are the same in all of them.",
        "Natural faults. Windows are broken on purpose, in seven ways at three severities.",
        "A fresh stream. There are few storms, so a stream this long goes through their windows"
        " several times.",
    ]
    return f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in points)}</ul>"
