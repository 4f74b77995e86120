"""The record behind the README's table on time series: runs the demo on storms, stores its JSON.

python -m bench.series_demo            run, then store and rewrite (about three minutes, two cores)
python -m bench.series_demo --table    rewrite the table from the stored record
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bench.readme import README, RECORDS, ROOT, replaced
from bench.record import say, write_record

RECORD = RECORDS / "series_demo.json"


def table(record: dict[str, Any]) -> str:
    """Methods as Markdown, and the sentences below it."""
    from metagrad_filter.demo.series_report import series_markdown_table

    world, scorer = record["world"], record["scorer"]
    facts = (
        f"{len(record['seeds'])} paired orders of one stream of {world['stream_windows']:,} "
        f"windows and one base model; {world['report_windows']:,} windows of other storms to "
        f"report on. Split-half reliability of the labels {scorer['label_reliability']:.2f}, rank "
        f"correlation of the scorer with labels it was not fitted on "
        f"{scorer['rank_correlation']:.2f}. The run took {record['seconds']:.0f} s on "
        f"{record['environment']['cpus']} CPU cores."
    )
    return f"{series_markdown_table(record).strip()}\n\n{facts}"


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.series_demo: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        from metagrad_filter.demo.series_config import SeriesDemoConfig
        from metagrad_filter.demo.series_run import run_series_demo

        write_record(RECORD, run_series_demo(SeriesDemoConfig(out=ROOT / "demo"), progress=_line))
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "series-demo-table", text))
    print(text)


def _line(stage: str, done: int, total: int) -> None:
    if done == total:
        say(stage)


if __name__ == "__main__":
    main(sys.argv[1:])
