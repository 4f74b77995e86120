"""Watching a filter at work: whether its scorer still fits the stream, and what it keeps.

    records = read_records(run_dir, "train")
    monitor = Monitor(references(run_dir))
    for finding in monitor.feed(records): ...
    if monitor.wants_round: calibrator.round()

Everything is computed from the records that the filter appends (`blockstats.py`), outside the
loader. Modules: `sketch` (score distributions that add), `drift` (statistics and what chance alone
does to them), `alarms` (when to say something), `sinks` (Prometheus, TensorBoard and others).
"""
