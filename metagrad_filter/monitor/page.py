"""A run's view as one HTML file that loads nothing.

    report_html(run_view(run_dir)) -> str

Styles, script, the uPlot library and the data are inside the file, so it can be mailed, archived
and opened without a network. Its content security policy names the hashes of its own two scripts
and its style sheet and allows nothing else. `live_html` is the same page for `server.py`, which may
also read events from where it came. Cost: milliseconds; 85 KB and the view.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.files import replace_file
from metagrad_filter.monitor.examples import Examples
from metagrad_filter.monitor.view import plain, run_view
from metagrad_filter.store import Store

View = Mapping[str, Any]

_SLOT = re.compile(r"\{\{(\w+)\}\}")
# Inside a script element only these can end it or start another one; JSON may spell them so.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def report_html(view: View) -> str:
    """Returns the page of a view, with data, styles and script inside.

    Args:
      view: as `run_view` returns it.
    """
    return _page(view, live=False)


def live_html(view: View) -> str:
    """Returns the page that draws itself again when its server pushes a view to `events`."""
    return _page(view, live=True)


def write_run_report(
    run_dir: str | os.PathLike[str] | Store,
    path: str | os.PathLike[str],
    *,
    examples: int = 0,
    tokenizer: str | os.PathLike[str] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Writes the page of a run; an existing file is replaced as a whole.

    Args:
      run_dir: as for `run_view`.
      path: file to write; readable by others, as a report is to be shown, unless it has examples.
      examples: windows of the stream to show at each end of the score, at most 50; they may be
        private, so there are none by default.
      tokenizer: decodes them, see `load_decoder`; None shows token ids.

    Returns:
      `path` and the view that it shows.

    Raises:
      ConfigError: `run_dir` is not a run's, or `examples` or `tokenizer` cannot be used.
      DataError: the file cannot be written.
    """
    shown = examples_of(run_dir, examples, tokenizer)
    target, view = Path(path), run_view(run_dir, examples=shown)
    try:
        replace_file(target, report_html(view).encode(), mode=0o600 if shown else 0o644)
    except OSError as error:
        raise DataError(
            f"The report {target} cannot be written ({error}). Pass a path that can."
        ) from error
    return target, view


def examples_of(
    run_dir: str | os.PathLike[str] | Store,
    count: int,
    tokenizer: str | os.PathLike[str] | None,
) -> Examples | None:
    """Returns what finds examples for a view, or None where none are asked for.

    Raises:
      ConfigError: `count` is out of its domain, a tokenizer has nothing to decode, or it cannot be
        read.
    """
    if type(count) is int and count == 0:
        if tokenizer is not None:
            raise ConfigError(
                f"tokenizer is {os.fspath(tokenizer)!r}, but no examples are asked for; pass "
                "examples=5 as well, which shows windows of the stream."
            )
        return None
    return Examples(run_dir, count, tokenizer=tokenizer)


def view_json(view: View) -> str:
    """Returns a view as JSON that is also safe inside a script element."""
    return json.dumps(plain(dict(view)), separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _page(view: View, *, live: bool) -> str:
    style = _asset("uPlot.min.css") + _asset("page.css")
    uplot, script = _asset("uPlot.iife.min.js"), _asset("page.js")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(uplot)} {_hash(script)}",
        f"style-src {_hash(style)}",
        *(["connect-src 'self'"] if live else []),
        "base-uri 'none'",
        "form-action 'none'",
    ]
    parts = {
        "live": "yes" if live else "no",
        "policy": "; ".join(policy),
        "style": style,
        "view": view_json(view),
        "licence": _asset("uPlot.LICENSE.txt"),
        "uplot": uplot,
        "script": script,
    }
    # One pass: what is put into a slot is not searched for slots.
    return _SLOT.sub(lambda slot: parts[slot[1]], _asset("page.html"))


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def _asset(name: str) -> str:
    folder = resources.files("metagrad_filter") / "monitor" / "assets"
    return (folder / name).read_text(encoding="utf-8")
