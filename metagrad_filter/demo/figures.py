"""The demo's figures as inline SVG that follows the page: light or dark, wide or narrow.

Answers "what do the results look like?". Each function takes a part of the results and returns the
text of one `<svg>` element, or None when the results lack what it shows. Colours are written as CSS
variables (`css_variables` gives their values) and text as text, so the page decides both. About
0.1 s a figure. Read next: `metagrad_filter.demo.report`.

A method, and a class, has one colour, one line style and one name everywhere. The hues are those of
Okabe and Ito, which people with any colour vision tell apart; line styles and markers repeat them.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metagrad_filter.errors import ConfigError


class Look(NamedTuple):
    """How one method or class is drawn."""

    name: str
    light: str  # hex colour on a light page
    dark: str  # hex colour on a dark page
    line: Any = "-"  # as matplotlib takes it
    marker: str = "o"


# In the order of the table: from what knows nothing to what knows the classes.
METHODS = {
    "random": Look("random", "#7a7f87", "#a3a9b3", ":"),
    "low_perplexity": Look("low perplexity", "#3a9bd9", "#6cc0f5", (0, (5, 2))),
    "domain_match": Look("domain match", "#009e73", "#2fc79b", "-."),
    "rho_loss": Look("RHO-loss", "#b8629a", "#e39ac8", (0, (3, 1, 1, 1, 1, 1))),
    "metagrad": Look("metagradient", "#d55e00", "#ff8a3d"),
    "on_target_only": Look("on-target only", "#2b3036", "#e8eaed", "--"),
}
CLASSES = {
    "on_target": Look("on target", "#0072b2", "#4fb3ee", "-", "o"),
    "off_target": Look("off target", "#dd9300", "#f2b84b", "--", "^"),
    "corrupt": Look("corrupt", "#52575e", "#b9bec7", ":", "x"),
}
# The demo on time series.
SERIES_METHODS = {
    "random": METHODS["random"],
    "surprise": Look("surprise", "#b3261e", "#ff8a80", (0, (1, 1))),
    "low_loss": Look("low loss", "#3a9bd9", "#6cc0f5", (0, (5, 2))),
    "rho_loss": METHODS["rho_loss"],
    "loss_band": Look("loss band", "#009e73", "#2fc79b", "-."),
    "metagrad": METHODS["metagrad"],
    "rare_oracle": Look("rare oracle", "#2b3036", "#e8eaed", "--"),
}
SERIES_CLASSES = {
    "normal": Look("usual", "#dd9300", "#f2b84b", "--", "^"),
    "rare": Look("rare", "#0072b2", "#4fb3ee", "-", "o"),
    "corrupt": CLASSES["corrupt"],
}
_METHODS = METHODS | SERIES_METHODS
_CLASSES = CLASSES | SERIES_CLASSES
_PLAIN = {
    "ink": ("#1b1f26", "#e6e8ec"),
    "muted": ("#5b6470", "#9aa3af"),
    "rule": ("#dfe3e8", "#343a44"),
}
# A method that this page does not know is drawn in the colour of plain text.
_UNKNOWN = Look("", *_PLAIN["muted"])

# Units of the picture; shown at about this width on a wide page and at 3/4 of it on a telephone.
_WIDTH, _HEIGHT = 500, 340
_POINTS = 1500


def method_look(name: str) -> Look:
    """Returns how a method is drawn; one that is not listed gets its own name in plain colour."""
    return _METHODS.get(name) or _UNKNOWN._replace(name=name.replace("_", " "))


def css_variables(*, dark: bool) -> str:
    """Returns the CSS declarations of every colour that the figures and the page use."""
    plain = {f"--{name}": pair[dark] for name, pair in _PLAIN.items()}
    drawn = {
        f"--{_slug(name)}": look.dark if dark else look.light
        for name, look in (_METHODS | _CLASSES).items()
    }
    return " ".join(f"{name}: {value};" for name, value in (plain | drawn).items())


def css_colour(name: str) -> str:
    """Returns the CSS value for a method or a class."""
    return f"var(--{_slug(name)})" if name in _METHODS or name in _CLASSES else "var(--muted)"


def loss_curves(
    methods: Mapping[str, Any],
    *,
    x: str = "training tokens",
    y: str = "held-out loss (nats/token)",
    title: str = "Held-out loss against training tokens for each method",
    name: str = "loss",
) -> str | None:
    """Draws held-out loss against training tokens: mean over seeds, band from least to greatest.

    Args:
      methods: name to results; `curve` holds `tokens` `(P,)` and `loss` `(P, seeds)` in nats per
        token (`(seeds, P)` is taken too). A method without a curve is left out.
      x: what is on the horizontal axis.
      y: what is on the vertical axis.
      title: what the figure shows, for readers who do not see it.
      name: of the figure; two figures of a page need different ones.
    """
    figure, axes = _figure(right=0.76)
    ends: list[tuple[float, str, str]] = []
    last = 0.0
    known = [n for n in _METHODS if n in methods]
    for method in [*known, *(n for n in methods if n not in _METHODS)]:
        curve = methods[method].get("curve") or {}
        tokens = np.asarray(curve.get("tokens") or [], float)
        loss = np.asarray(curve.get("loss") or [], float)
        if loss.ndim == 1:
            loss = loss[:, None]
        if len(loss) != len(tokens) and loss.shape[-1] == len(tokens):
            loss = loss.T
        if len(tokens) < 2 or len(loss) != len(tokens) or not np.isfinite(loss).all():
            continue
        look = method_look(method)
        front = method == "metagrad"
        axes.fill_between(
            tokens, loss.min(1), loss.max(1), color=look.light, alpha=0.16, lw=0, zorder=2
        )
        axes.plot(
            tokens,
            loss.mean(1),
            color=look.light,
            ls=look.line,
            lw=2.6 if front else 1.8,
            zorder=4 if front else 3,
        )
        ends.append((float(loss.mean(1)[-1]), look.name, look.light))
        last = max(last, tokens[-1])
    if not ends:
        return None
    axes.set_xlim(0, last)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    _label_ends(axes, last, ends)
    return _svg(figure, name, title)


def kept_over_stream(stream: Mapping[str, Any]) -> str | None:
    """Draws each class's share of the kept windows, block by block, and where versions change.

    Args:
      stream: `kept_share` with one list per class, `swaps` with `block` and `version` of each.
    """
    shares = {n: v for n, v in (stream.get("kept_share") or {}).items() if n in _CLASSES and v}
    if not shares:
        return None
    figure, axes = _figure(right=0.82, top=0.87)
    swaps = sorted((int(s["block"]), s["version"]) for s in stream.get("swaps") or [])
    ends: list[tuple[float, str, str]] = []
    blocks = max(len(values) for values in shares.values())
    for name, look in _CLASSES.items():
        if name not in shares:
            continue
        values = np.asarray(shares[name], float)
        axes.plot(values, color=look.light, lw=0.8, alpha=0.35)
        smooth = values.copy()
        for start, stop in _segments([block for block, _ in swaps], len(values)):
            smooth[start:stop] = _smooth(values[start:stop], max(3, blocks // 24))
            place = np.arange(start, stop)
            axes.plot(place, smooth[start:stop], color=look.light, ls=look.line, lw=2.2)
        seen = smooth[np.isfinite(smooth)]
        if len(seen):
            ends.append((float(seen[-1]), look.name, look.light))
    right = max(blocks - 1, 1)
    axes.set_xlim(0, right)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("block of the stream")
    axes.set_ylabel("share of the kept windows")
    row, previous = 0, -np.inf
    for block, version in swaps:
        # Labels of neighbouring swaps alternate between two rows above the plot.
        row = 1 - row if block - previous < 0.2 * right else 0
        previous = block
        axes.axvline(block, color=_PLAIN["muted"][0], lw=1, ls=(0, (2, 2)), zorder=1)
        axes.text(
            block,
            1.05 + 0.065 * row,
            f"version {version}",
            color=_PLAIN["muted"][0],
            size=11,
            parse_math=False,
            transform=axes.get_xaxis_transform(),
        )
    _label_ends(axes, right, ends)
    return _svg(figure, "stream", "Share of each class among the kept windows over the stream")


def score_histogram(histogram: Mapping[str, Any]) -> str | None:
    """Draws the scores of each class as one step curve.

    Args:
      histogram: `edges` `(E + 1,)` and, per class, `(E,)` counts of windows.
    """
    edges = np.asarray(histogram.get("edges") or [], float)
    present = {n: np.asarray(histogram[n], float) for n in _CLASSES if histogram.get(n)}
    if len(edges) < 2 or not present:
        return None
    figure, axes = _figure()
    for name, counts in present.items():
        if len(counts) != len(edges) - 1:
            continue
        look = _CLASSES[name]
        axes.stairs(counts, edges, fill=True, color=look.light, alpha=0.16, lw=0)
        axes.stairs(counts, edges, color=look.light, lw=1.9, ls=look.line)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("score (higher is kept)")
    axes.set_ylabel("windows")
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    return _svg(figure, "histogram", "Scores of the windows by class")


def score_against_label(scatter: Mapping[str, Any]) -> str | None:
    """Draws the scorer's score against the probe's label, both as percentiles.

    Percentiles because labels have extreme tails and selection uses the order only.

    Args:
      scatter: `label`, `score` and `class` (index or name) of the same windows.
    """
    label = np.asarray(scatter.get("label") or [], float)
    score = np.asarray(scatter.get("score") or [], float)
    classes = list(scatter.get("class") or [])
    if not len(label) == len(score) == len(classes) or len(label) < 2:
        return None
    names = list(CLASSES)
    kinds = np.array([k if isinstance(k, str) else names[int(k) % len(names)] for k in classes])
    shown = np.unique(np.linspace(0, len(label) - 1, min(_POINTS, len(label))).astype(int))
    x, y = _percentiles(label)[shown], _percentiles(score)[shown]
    figure, axes = _figure()
    axes.plot([0, 100], [0, 100], color=_PLAIN["muted"][0], lw=1, ls=(0, (4, 3)), zorder=1)
    for name, look in _CLASSES.items():
        mine = kinds[shown] == name
        axes.plot(
            x[mine],
            y[mine],
            ls="none",
            marker=look.marker,
            ms=3.2,
            mew=0 if look.marker != "x" else 0.9,
            color=look.light,
            alpha=0.6,
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_xlabel("probe label (percentile)")
    axes.set_ylabel("scorer's score (percentile)")
    return _svg(figure, "scatter", "Score of the scorer against label of the probe")


def short_number(value: float) -> str:
    """Writes a count with a unit prefix: 1.5k, 2M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _figure(*, right: float = 0.97, top: float = 0.96) -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"The module {error.name!r} is not installed; the report's figures need matplotlib."
            " Run `pip install metagrad-filter[demo]`."
        ) from error
    ink, muted, rule = (_PLAIN[name][0] for name in ("ink", "muted", "rule"))
    with rc_context({"font.size": 12, "text.color": ink, "text.parse_math": False}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        figure.subplots_adjust(left=0.135, right=right, bottom=0.15, top=top)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(rule)
        axes.grid(axis="y", color=rule, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5, labelcolor=muted, labelsize=12)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=ink, size=12)
        axes.locator_params(nbins=5)
    return figure, axes


def _label_ends(axes: Any, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name beside its end, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    step = 0.062 * (high - low)
    ends = sorted(ends)
    places = [y for y, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + step)
    # Pushed over the top: move the pile down as far as it has to go.
    ceiling = high + step / 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling - step * (len(places) - 1 - i))
    for (y, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.045, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=colour,
            va="center",
            size=12,
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.8,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def _svg(figure: Any, name: str, title: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # A fixed salt gives equal figures equal text; text stays text so that the page sets its font.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    opening = (
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.S)
    # Several figures share one page, so their ids need a prefix.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    for variable, light in _variables():
        text = text.replace(light, f"var({variable})")
    return text


def _variables() -> list[tuple[str, str]]:
    plain = [(f"--{name}", pair[0]) for name, pair in _PLAIN.items()]
    return plain + [
        (f"--{_slug(name)}", look.light) for name, look in (_METHODS | _CLASSES).items()
    ]


def _slug(name: str) -> str:
    return name.replace("_", "-")


def _segments(cuts: Sequence[int], length: int) -> list[tuple[int, int]]:
    bounds = sorted({0, length, *(cut for cut in cuts if 0 < cut < length)})
    return list(itertools.pairwise(bounds))


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over finite values; shorter at both ends."""
    kernel = np.ones(min(width | 1, 2 * len(values) - 1))
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "full")
    count = np.convolve(finite.astype(float), kernel, "full")
    middle = slice(len(kernel) // 2, len(kernel) // 2 + len(values))
    return np.where(count[middle] > 0, total[middle] / np.maximum(count[middle], 1), np.nan)


def _percentiles(values: np.ndarray) -> np.ndarray:
    return 100 * (np.argsort(np.argsort(values, kind="stable")) + 0.5) / len(values)
