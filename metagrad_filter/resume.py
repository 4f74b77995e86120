"""Whether a checkpointed state belongs to this filter; if not, which field says so.

    check_state(state, fields, format=2, record=json.dumps(config.record()))

Every iterator of a filter stores its configuration in its state, as one JSON string: states are
copied for every element, and a string is copied for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from metagrad_filter.errors import StateMismatch


def check_state(state: Any, fields: Collection[str], *, format: int, record: str) -> None:
    """Checks a state before it is used.

    Args:
      state: as it came from a checkpoint.
      fields: the names that it must have, `filter` and `format` among them.
      format: the number of the format that is read.
      record: JSON object of this filter's configuration.

    Raises:
      StateMismatch: it is another pipeline's, package version's or filter's; names the first field
        that differs.
    """
    if not isinstance(state, dict) or set(state) != set(fields):
        seen = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise StateMismatch(
            f"The checkpoint's filter state has fields {seen}, expected {sorted(fields)}; it was "
            "written by another pipeline, restore it with that one."
        )
    if state["format"] != format:
        raise StateMismatch(
            f"The checkpoint's filter state has format {state['format']!r}, this package reads "
            f"{format}; resume with the package version that wrote it."
        )
    if state["filter"] == record:
        return
    try:
        before = json.loads(state["filter"])
    except (TypeError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise StateMismatch(
            "The checkpoint's filter state describes its filter as "
            f"{str(state['filter'])[:80]!r}; it is damaged, restore an earlier checkpoint."
        )
    now = json.loads(record)
    for field in sorted(before.keys() | now.keys()):
        if before.get(field) != now.get(field):
            raise StateMismatch(
                f"The checkpoint was written by a filter with {field}={before.get(field)!r}, this "
                f"one has {now.get(field)!r}; resume with the recorded value."
            )
