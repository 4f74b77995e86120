"""The `metagrad-filter` command.

Every subcommand is a frozen dataclass: its fields are the flags and its docstring is the help. Bad
input ends with one clear line on standard error and exit code 2 (1 for anything that failed while
it ran, a check that did not pass included); `--json` prints one JSON document on standard output
and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from metagrad_filter.errors import ConfigError, MetagradFilterError

if TYPE_CHECKING:
    from metagrad_filter.calibration.settings import Settings


@dataclass(frozen=True)
class Demo:
    """Run the whole job on real data: train, calibrate, filter a live stream, compare, report.

    Downloads one or two small packages of data once (about 60 MB), then needs no network. Takes
    under ten minutes on two CPU cores, or two with --quick.
    """

    kind: Literal["text", "series"] = "text"
    """text: abstracts against news; series: rapid intensification in Atlantic storms."""
    out: Path = Path("demo")
    """Folder for results.json, report.html and the run directory."""
    seeds: int | None = None
    """Paired seeds, each with its own order of the stream; 3, or 1 with --quick."""
    quick: bool = False
    """A small run that shows every step; its figures prove little."""
    json: bool = False
    """Print the results as JSON instead of a table."""

    def run(self, console: Console) -> dict[str, Any]:
        # The worker process compiles the same programs as this one; both read this variable when
        # they import jax, which is why it is set before.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((self.out / "compiled").absolute()))
        run, table = self._text() if self.kind == "text" else self._series()
        with _progress(console) as progress:
            results = run(progress=progress)
        console.print(table(results))
        scorer, differences = results["scorer"], results["finite_difference"]
        console.print(
            f"scorer: rank correlation with unseen labels {scorer['rank_correlation']:.2f}, "
            f"split-half reliability of the labels {scorer['label_reliability']:.2f}\n"
            f"adjoint against finite differences: rank correlation "
            f"{differences['rank_correlation']:.4f}\n"
            f"{results['seconds']:.0f} s; see {self.out / 'report.html'}"
        )
        return results

    def _text(self) -> tuple[Callable[..., dict[str, Any]], Callable[..., Table]]:
        from metagrad_filter.demo.config import DemoConfig
        from metagrad_filter.demo.report import summary_table
        from metagrad_filter.demo.run import run_demo

        return functools.partial(run_demo, self._sized(DemoConfig(out=self.out))), summary_table

    def _series(self) -> tuple[Callable[..., dict[str, Any]], Callable[..., Table]]:
        from metagrad_filter.demo.series_config import SeriesDemoConfig
        from metagrad_filter.demo.series_report import series_summary_table
        from metagrad_filter.demo.series_run import run_series_demo

        config = self._sized(SeriesDemoConfig(out=self.out))
        return functools.partial(run_series_demo, config), series_summary_table

    def _sized(self, config: Any) -> Any:
        config = config.quick() if self.quick else config
        return config if self.seeds is None else replace(config, seeds=self.seeds)


@dataclass(frozen=True)
class Inspect:
    """Show the versions, ledgers and calibration rounds of a run directory."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The directory that the filter and the calibrator share."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, console: Console) -> dict[str, Any]:
        from metagrad_filter.inspection import inspect_run

        found = inspect_run(self.run_dir)
        versions = Table("version", "round", "form", "labels", "rank corr.", "strength", "state")
        for entry in found["versions"]:
            versions.add_row(*(_cell(entry.get(name)) for name in _VERSION_FIELDS))
        console.print(versions)
        for name, entries in found["ledgers"].items():
            used = ", ".join(f"{entry['interval']}→{entry['version']}" for entry in entries)
            console.print(f"ledger {name}: interval→version {used or 'nothing decided yet'}")
        for entry in found["rejected"]:
            console.print(f"rejected: {entry['reason']}")
        return found


@dataclass(frozen=True)
class Doctor:
    """Check the installation and, with --metagradients, that metagradients are right.

    Prints versions, devices, memory and whether the native scorer runs. The checks of metagradients
    (adjoint against autodiff, finite differences, metasmoothness, split-half reliability, linear
    datamodeling score) take about a minute on the built-in decoder. Exit code 1 if one fails, with
    a line for each on standard error.
    """

    metagradients: bool = False
    """Also check metagradients on the built-in decoder, or on --setup."""
    setup: str | None = None
    """Your own model: package.module:function, a function without arguments that returns the
    Calibrator of your training. The checks run at its horizon, batch and learning rate; their cost
    is about that of 50 + 2 x subsets trajectories. Implies --metagradients."""
    subsets: int = 24
    """Half-subsets that the linear datamodeling score retrains on, twice each."""
    json: bool = False
    """Print the findings as JSON instead of tables."""

    def run(self, console: Console) -> dict[str, Any]:
        from metagrad_filter.doctor import (
            examine,
            examine_small_world,
            inspect_installation,
            load_setup,
        )

        if self.subsets < 3:
            raise ConfigError(f"subsets={self.subsets}; expected at least 3.")
        own = load_setup(self.setup) if self.setup is not None else None
        installation = inspect_installation()
        console.print(_installation_table(installation))
        rows = []
        if self.metagradients or own is not None:
            with _progress(console) as progress:
                if own is None:
                    rows = examine_small_world(subsets=self.subsets, progress=progress)
                else:
                    rows = examine(
                        own.proxy,
                        own.target.parts["target"],
                        own.source,
                        own.config,
                        subsets=self.subsets,
                        progress=progress,
                    )
            console.print(_examination_table(rows))
        failed = [*installation["problems"], *(str(row) for row in rows if not row.passed)]
        for line in failed:
            _fail(line, 1)
        return {
            "installation": installation,
            "checks": [row.to_json() for row in rows],
            "passed": not failed,
        }


@dataclass(frozen=True)
class Calibrate:
    """Run calibration beside training: in a process of its own, as a settings file says.

    Runs one round, or with --watch rounds until SIGTERM: at the schedule's times, as training goes
    on, and when the drift monitor asks. Training is not involved, and one process calibrates a run
    directory at a time. --example prints a settings file with every default.
    """

    settings: Annotated[Path | None, tyro.conf.Positional] = None
    """A TOML file; see --example."""
    watch: bool = False
    """Go on with rounds, and wait for another process that calibrates this run directory."""
    check: Literal["tilt", "lds"] | None = None
    """Run no round; ask training whether labels are right, by mixtures tilted towards clusters of
    windows or by random halves, and print it beside the labels' reliability."""
    example: bool = False
    """Print an example of a settings file and do nothing else."""
    json: bool = False
    """Print the number of rounds as JSON; what happens meanwhile goes to standard error."""

    def run(self, console: Console) -> dict[str, Any]:
        from metagrad_filter.calibration.settings import Settings, example
        from metagrad_filter.calibration.watch import watch

        if self.example:
            text = example()
            if not self.json:
                print(text, end="")
            return {"example": text}
        if self.settings is None:
            raise ConfigError("a settings file is missing; name one, or see --example.")
        settings = Settings.load(self.settings)
        if self.check is not None:
            if self.watch:
                raise ConfigError("--check runs no rounds; give it without --watch.")
            return self._checked(settings, self.check, console)
        with _progress(console) as progress:
            rounds = watch(
                settings,
                once=not self.watch,
                say=lambda line: console.print(line, markup=False, highlight=False),
                progress=progress,
            )
        return {"rounds": rounds}

    def _checked(
        self, settings: Settings, kind: Literal["tilt", "lds"], console: Console
    ) -> dict[str, Any]:
        settings.worker.apply()
        calibrator = settings.calibrator()
        calibrator.observe()
        with _progress(console) as progress:
            calibrator.progress = progress
            found = calibrator.check(kind)
        console.print(str(found), markup=False, highlight=False)
        if found.classes:
            table = Table("class", "share", "mean label", "effect", "standard error")
            for entry in found.classes:
                table.add_row(*(_cell(value) for value in entry.values()))
            console.print(table)
        return found.to_json()


@dataclass(frozen=True)
class Report:
    """Write what a run has done as one HTML file that needs no network."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The directory that the filter and the calibrator share."""
    out: Path = Path("report.html")
    """File to write."""
    examples: int = 0
    """Windows of the stream to show at each end of the score; they may be private, so none by
    default."""
    tokenizer: str | None = None
    """Decodes the examples: a tokenizer.json, a folder that holds one, or a model's name in this
    machine's cache. Without it token ids are shown."""
    json: bool = False
    """Print what the page shows as JSON as well."""

    def run(self, console: Console) -> dict[str, Any]:
        from metagrad_filter.monitor.page import write_run_report

        path, view = write_run_report(
            self.run_dir, self.out, examples=self.examples, tokenizer=self.tokenizer
        )
        console.print(f"see {path}")
        return view


@dataclass(frozen=True)
class Monitor:
    """Show a run in the browser while it goes on; needs metagrad-filter[monitor]."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The directory that the filter and the calibrator share."""
    host: str = "127.0.0.1"
    """Address to listen on; there is no password, so other addresses show the run to others."""
    port: int = 8377
    """TCP port; 0 for any free one."""
    metrics_port: int | None = None
    """Port on which Prometheus is answered as well; 0 for any free one. The page's own port answers
    /metrics in any case."""
    examples: int = 0
    """Windows of the stream to show at each end of the score; they may be private, so none by
    default, and on 127.0.0.1 only."""
    tokenizer: str | None = None
    """Decodes the examples; as for report."""
    json: bool = False
    """Print an empty JSON object at the end."""

    def run(self, console: Console) -> dict[str, Any]:
        from metagrad_filter.monitor.server import serve

        serve(
            self.run_dir,
            self.host,
            self.port,
            metrics_port=self.metrics_port,
            examples=self.examples,
            tokenizer=self.tokenizer,
        )
        return {}


def _installation_table(found: dict[str, Any]) -> Table:
    table = Table("installation", "", box=box.SIMPLE, pad_edge=False)
    for name, number in found["versions"].items():
        table.add_row(name, number or "missing")
    table.add_row("devices", ", ".join(found["devices"]) or "none")
    native = found["native_scorer"]
    scorer = native["instruction_set"] if native["loaded"] else f"no: {native['reason']}"
    table.add_row("native scorer", scorer)
    sizes = [f"{size / 2**30:.1f} GiB" for size in found["memory"].values() if size is not None]
    table.add_row("memory, available", ", ".join(sizes) or "unknown")
    return table


def _examination_table(rows: list[Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("check", "value", "expected", "", "detail"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g}"
        verdict = Text("passed", "green") if row.passed else Text("failed", "red")
        table.add_row(row.name, value, row.expected, verdict, Text(row.detail))
    return table


_VERSION_FIELDS = (
    "version",
    "round",
    "form",
    "labels",
    "rank_correlation",
    "strength",
    "state",
)

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Monitor, tyro.conf.subcommand("monitor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    command = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="metagrad-filter",
        description="A streaming data filter for pretraining, learned from metagradients.",
        args=arguments,
    )
    console = Console(stderr=command.json)
    try:
        results = command.run(console)
    except ConfigError as error:
        return _fail(error, 2)
    except (MetagradFilterError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what was written so far is complete and can be read.", 130)
    if command.json:
        print(json.dumps(results))
    return 0 if results.get("passed", True) else 1


def _fail(error: Exception | str, code: int) -> int:
    print(f"metagrad-filter: {error}", file=sys.stderr)
    return code


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on a terminal, one line per finished stage elsewhere."""
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    if not console.is_terminal:

        def line(stage: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"{stage}: done")

        yield line
        return
    with Progress(*columns, console=console) as bars:
        running: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in running:
                running[stage] = bars.add_task(stage, total=total)
            bars.update(running[stage], completed=done, total=total)

        yield show


if __name__ == "__main__":
    sys.exit(main())
