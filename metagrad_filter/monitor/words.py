"""What alarms, verdicts and checks say, in sentences for people who did not write them.

    alarm_text({"kind": "psi", "state": "raised", "value": 0.05, "limit": 0.011, ...}) -> str
    verdict("worse_than_running: ...") -> str

Pure functions from fields that nobody has checked to text; what is unknown is said as it stands.
Read next: `view.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metagrad_filter.monitor.records import number

_ALARMS = {
    "psi": "the scores' distribution differs from the version's reference (PSI {value}, limit "
    "{limit})",
    "ks": "the scores' distribution differs from the version's reference (KS {value}, limit "
    "{limit})",
    "mean": "the mean score has moved away from the version's reference (cumulative sum {value}, "
    "limit {limit})",
    "keep_ratio": "the realised keep ratio misses its target by {value} (allowed {limit})",
    "age": "the acting version is {value} blocks old (allowed {limit})",
    "rank_agreement": "the scorer ranks fresh labels with a correlation of {value} only (expected "
    "{limit})",
}

# Reasons of rounds and rejected candidates, up to the first colon.
_VERDICTS = {
    "published": "Published.",
    "uniform_beats_running": "Published with strength 0: the running version loses to a uniform "
    "choice.",
    "unreliable": "Not published: the two halves of the labels disagree too much.",
    "non_finite": "Not published: a metagradient was not a finite number.",
    "diverged": "Not published: a trajectory diverged.",
    "starves": "Not published: it would starve a source of windows.",
    "guard": "Not published: a guard's held-out loss would get worse.",
    "gate": "Not published: no strength was clearly better than a uniform choice.",
    "not_better_than_uniform": "Not published: no strength was clearly better than a uniform "
    "choice.",
    "worse_than_running": "Not published: it is clearly worse than the running version.",
}


def alarm_text(alarm: Mapping[str, Any]) -> str:
    """Returns what was raised or cleared, as one sentence."""
    kind = str(alarm.get("kind"))
    shown = {name: _figure(alarm.get(name)) for name in ("value", "limit")}
    if kind.startswith("feature:"):
        what = f"the windows' feature {kind[8:]!r} has moved by {{value}} (limit {{limit}})"
        # A feature's name may hold braces.
        text = what.replace("{value}", shown["value"]).replace("{limit}", shown["limit"])
    elif kind in _ALARMS:
        text = _ALARMS[kind].format(**shown)
    else:
        text = f"{kind} is {shown['value']} (limit {shown['limit']})"
    if alarm.get("state") == "cleared":
        value, limit = number(alarm.get("value")), number(alarm.get("limit"))
        # The last look was still beyond the limit: another version began, which starts afresh.
        above = None not in (value, limit) and abs(value or 0.0) > (limit or 0.0)
        fresh = above and kind != "rank_agreement"
        return f"No longer so: {text}." + (" Another version acts." if fresh else "")
    return f"{text[0].upper()}{text[1:]}."


def verdict(reason: Any) -> str:
    """Returns what a round's reason means, as one sentence; what it says itself if unknown."""
    if not isinstance(reason, str) or not reason.strip():
        return "No reason given."
    code = reason.partition(":")[0].strip().replace("-", "_").replace(" ", "_").lower()
    return _VERDICTS.get(code, reason)


def _figure(value: Any) -> str:
    found = number(value)
    return "unknown" if found is None else f"{found:.4g}"
