"""Reads the records of block statistics and the alarms that are appended to a run.

    read_records(store, "metrics/train") -> records, damaged
    read_alarms(store) -> alarms, damaged

Nothing about a line is taken for granted: a crash tears lines, and files may come from elsewhere.
What makes a record one is checked here, its other fields where they are used, through `number`,
`is_count` and `items`, which give None or nothing for what is not what it should be.

An alarm is a line of `monitor/alarms.jsonl`: `{"format": 1, "filter": "train", "version": 3,
"kind": "psi", "block": 4095, "value": 0.05, "limit": 0.011, "state": "raised", "time": 1.8e9}`,
the fields of a `Finding` and what it was found of; `state` is "raised" or "cleared".

Input: lines of JSON, format 1. Cost: about 0.1 ms a record; at most 64 MiB, the newest, are read,
and of alarms at most 8 MiB. Read next: `stream.py`, `alarms.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from metagrad_filter.store import Store, is_key

BINS = 64
FORMAT = 1
ALARMS = "monitor/alarms.jsonl"

_MAX_ALARM_BYTES = 8 * 2**20
_KIND_LENGTH = 80
_MAX_FILE_BYTES = 16 * 2**20
_MAX_BYTES = 64 * 2**20
_COUNTS = ("first_block", "last_block", "blocks", "windows", "kept")
# host-pid-start, then a part of the session or the record's number.
_NAME = re.compile(r".*-(\d{10,20})(?:-(\d{1,20}))?\.jsonl?", re.ASCII)

Record = dict[str, Any]


def read_records(store: Store, folder: str) -> tuple[list[Record], int]:
    """Reads the records of one filter, from its newest files up to 64 MiB.

    Args:
      store: the run's store.
      folder: `metrics/<name>`.

    Returns:
      The records in the order of the stream, and the number of lines that are not one: torn by a
      crash, or of another format. Raises `OSError`.
    """
    names = [n for n in store.names(folder) if is_key(n) and n.endswith((".jsonl", ".json"))]
    names.sort(key=_age, reverse=True)
    records, damaged, size = [], 0, 0
    for name in names:
        if size >= _MAX_BYTES:
            break
        try:
            data = store.read(f"{folder}/{name}", _MAX_FILE_BYTES)
        except FileNotFoundError:
            continue
        except ValueError:
            damaged += 1
            continue
        size += len(data)
        for line in filter(None, data.split(b"\n")):
            record = parse_record(line)
            if record is None:
                damaged += 1
            else:
                records.append(record)
    return sorted(records, key=lambda r: (r["first_block"], r["version"], r["last_block"])), damaged


def read_alarms(store: Store) -> tuple[list[Record], int]:
    """Reads what was raised and cleared for the filters of a run, in the order it was written.

    Args:
      store: the run's store.

    Returns:
      The alarms, and the number of lines that are not one; a file of more than 8 MiB counts as one.
      Raises `OSError`.
    """
    try:
        data = store.read(ALARMS, _MAX_ALARM_BYTES)
    except FileNotFoundError:
        return [], 0
    except ValueError:
        return [], 1
    alarms = [parse_alarm(line) for line in data.split(b"\n") if line]
    found = [alarm for alarm in alarms if alarm is not None]
    return found, len(alarms) - len(found)


def parse_alarm(line: bytes) -> Record | None:
    """Returns the alarm of a line, or None for anything that is not a whole one."""
    try:
        alarm = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(alarm, dict) or alarm.get("format") != FORMAT:
        return None
    if not isinstance(alarm.get("filter"), str):
        return None
    kind = alarm.get("kind")
    if not isinstance(kind, str) or not 0 < len(kind) <= _KIND_LENGTH:
        return None
    if alarm.get("state") not in ("raised", "cleared") or not is_count(alarm.get("block")):
        return None
    return alarm


def parse_record(line: bytes) -> Record | None:
    """Returns the record of a line, or None for anything that is not a whole one."""
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    if not all(is_count(record.get(name)) for name in _COUNTS):
        return None
    if type(record.get("version")) is not int or not -1 <= record["version"] < 2**53:
        return None
    if record["kept"] > record["windows"] or record["first_block"] > record["last_block"]:
        return None
    scores = record.get("scores")
    if scores is not None:
        if not isinstance(scores, dict) or not is_count(scores.get("count")):
            return None
        for name in ("bins", "kept_bins"):
            bins = scores.get(name)
            if bins is not None and not _is_histogram(bins):
                return None
    return record


def items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if usable else None


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _age(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def _is_histogram(value: Any) -> bool:
    # 2**40 windows a bin: sums of all records stay within int64.
    return (
        isinstance(value, list)
        and len(value) == BINS
        and all(type(count) is int and 0 <= count < 2**40 for count in value)
    )


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
