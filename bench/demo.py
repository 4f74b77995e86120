"""The record behind the README's table: runs the demo, stores its JSON, rewrites the table.

python -m bench.demo            run, then store and rewrite (about ten minutes on two cores)
python -m bench.demo --table    rewrite the table from the stored record
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

from bench.readme import README, RECORDS, ROOT, replaced
from bench.record import write_record

RECORD = RECORDS / "demo.json"


def facts(record: dict[str, Any]) -> str:
    """The sentences below the table, each figure from the record."""
    scorer, check = record["scorer"], record["finite_difference"]
    world, config = record["world"], record["config"]
    return (
        f"{len(record['seeds'])} paired seeds; spread is the standard deviation over them. "
        f"{config['parameters']:,} parameters, {world['stream_windows']:,} stream windows of "
        f"{world['window_tokens']} tokens, base model at {record['base_loss']:.3f} nats/token. "
        f"Split-half reliability of the labels {scorer['label_reliability']:.2f}, rank correlation "
        f"of the scorer with labels it was not fitted on {scorer['rank_correlation']:.2f}, of the "
        f"adjoint with finite differences {check['rank_correlation']:.3f}. "
        f"{len(record['versions'])} versions, the second swapped in mid-stream; scoring took "
        f"{scorer['score_seconds'] / world['stream_windows'] * 1e6:.2f} microseconds per window. "
        f"The run took {record['seconds']:.0f} s on {record['environment']['cpus']} CPU cores."
    )


def with_table(readme: str, record: dict[str, Any]) -> str:
    """The README with the table and its facts replaced by those of the record."""
    from metagrad_filter.demo.report import markdown_table

    return replaced(readme, "demo-table", f"{markdown_table(record).strip()}\n\n{facts(record)}")


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.demo: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        compiled = ROOT / "demo" / "compiled"
        # The record's seconds include compilation, as a first run's do.
        shutil.rmtree(compiled, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        from metagrad_filter.demo.config import DemoConfig
        from metagrad_filter.demo.run import run_demo

        results = run_demo(DemoConfig(out=ROOT / "demo"), progress=_line)
        write_record(RECORD, results)
    README.write_text(with_table(README.read_text(), json.loads(RECORD.read_text())))


def _line(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{stage}: done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
