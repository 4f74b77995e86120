"""When drift is worth a word, and when it is worth a calibration round.

    monitor = Monitor(references(run_dir), target_keep_ratio=0.25)
    findings = monitor.feed(read_records(run_dir, "train"))      # what changed, in order
    monitor.wants_round                                          # an alarm that a new scorer cures

A statistic must pass its chance limit in `a` of `b` looks before an alarm is raised and stay below
for `c` looks before it is cleared, so that one odd shard says nothing. Without drift one look in
ten thousand passes, and far less than one alarm is raised in 10^6 windows; a shift of half a
standard deviation raises one at the second look (`tests/test_alarms.py`). A new version starts
afresh: its scores have another meaning. No clock, no files; the state is JSON.

Read next: `drift.py` (the statistics), `sinks.py` (where findings go).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metagrad_filter.blockstats import merge
from metagrad_filter.errors import ConfigError, StateMismatch
from metagrad_filter.monitor.drift import (
    REFERENCE_WINDOWS,
    Cusum,
    cusum_limit,
    ks,
    ks_limit,
    mean_shift,
    merge_atoms,
    psi,
    psi_limit,
    reference_moments,
)
from metagrad_filter.monitor.sketch import ScoreSketch

TRIGGERS = ("psi", "ks", "mean", "rank_agreement")

_SESSIONS = 4096  # processes of a run that are told apart
_BASELINE_BLOCKS = 64  # first blocks of a version, against which features are compared
_REFERENCE_ERRORS = 4.0  # standard errors of the reference mean that no shift is seen within


@dataclass(frozen=True)
class Finding:
    """One statistic at one look.

    Attributes:
      kind: "psi", "ks", "mean", "keep_ratio", "age", "rank_agreement" or "feature:<name>".
      block: the last block of the look.
      value: the statistic.
      limit: what it is compared with.
      state: from `feed`, "raised" or "cleared"; in `current`, "raised" or "quiet".
    """

    kind: str
    block: int
    value: float
    limit: float
    state: str


@dataclass(frozen=True)
class Alarm:
    """Raises after `needed` of the last `among` looks above the limit; clears with hysteresis.

    Attributes:
      needed: looks above, in [1, among].
      among: looks that are remembered.
      clear_after: looks below in a row that clear it, >= 1.
      recent: whether the last looks were above, oldest first.
      raised: whether it stands.
    """

    needed: int = 2
    among: int = 3
    clear_after: int = 3
    recent: tuple[bool, ...] = ()
    raised: bool = False

    def __post_init__(self):
        if not 1 <= self.needed <= self.among or self.clear_after < 1:
            raise ConfigError(
                f"needed is {self.needed!r} of among {self.among!r}, clear_after "
                f"{self.clear_after!r}; expected 1 <= needed <= among and clear_after >= 1."
            )

    def observe(self, above: bool) -> Alarm:
        """Returns the alarm after one more look."""
        recent = (*self.recent, bool(above))[-max(self.among, self.clear_after) :]
        if self.raised:
            quiet = len(recent) >= self.clear_after and not any(recent[-self.clear_after :])
            raised = not quiet
        else:
            raised = sum(recent[-self.among :]) >= self.needed
        # What raised or kept up an alarm is used up with it.
        return dataclasses.replace(
            self, recent=() if raised != self.raised else recent, raised=raised
        )


class Monitor:
    """Follows the records of one filter.

    Args:
      reference: from a version to its reference quantiles or None (see `sketch.references`); None
        when no version has any, which leaves the mean unwatched.
      target_keep_ratio: what is asked of the filter, in (0, 1]; None leaves it unwatched.
      level: false-alarm probability of one look at one statistic, in [1e-6, 0.1].
      reference_windows: windows of the reference sample.
      windows_per_sample: windows that count as one independent sample, >= 1: how many windows in a
        row come from one document.
      min_windows: scored windows per look; smaller records are added up.
      run_length: looks between two false alarms of the cumulative sum of the mean, on average.
      keep_tolerance: share by which the keep ratio of a look may miss its target, besides one
        window a block.
      max_age_blocks: blocks after which a version is called old; None for never.
      min_agreement: rank correlation with fresh labels that a scorer must be able to have.
      alarm: how often a limit must be passed.
      triggers: kinds that a calibration round answers.

    Attributes:
      current: the newest look at each kind.
      skipped: records of older versions than the one that is followed.

    Raises:
      ConfigError: an argument is out of its domain.
    """

    def __init__(
        self,
        reference: Callable[[int], Sequence[float] | None] | None = None,
        *,
        target_keep_ratio: float | None = None,
        level: float = 1e-4,
        reference_windows: int = REFERENCE_WINDOWS,
        windows_per_sample: float = 1.0,
        min_windows: int = 512,
        run_length: float = 1e5,
        keep_tolerance: float = 0.01,
        max_age_blocks: int | None = None,
        min_agreement: float = 0.1,
        alarm: Alarm | None = None,
        triggers: Sequence[str] = TRIGGERS,
    ):
        for name, value, low, high in (
            ("target_keep_ratio", 1 if target_keep_ratio is None else target_keep_ratio, 1e-9, 1),
            ("level", level, 1e-6, 0.1),
            ("reference_windows", reference_windows, 128, float("inf")),
            ("windows_per_sample", windows_per_sample, 1, float("inf")),
            ("min_windows", min_windows, 1, float("inf")),
            ("max_age_blocks", 1 if max_age_blocks is None else max_age_blocks, 1, float("inf")),
            ("keep_tolerance", keep_tolerance, 0, 1),
            ("min_agreement", min_agreement, -1, 1),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}, expected a number in [{low:g}, {high:g}].")
        self._reference = reference
        self._target = None if target_keep_ratio is None else float(target_keep_ratio)
        self._level = level
        self._reference_windows = reference_windows
        self._per_sample = windows_per_sample
        self._min_windows = min_windows
        self._tolerance = keep_tolerance
        self._max_age = max_age_blocks
        self._min_agreement = min_agreement
        self._alarm = alarm or Alarm()
        self._triggers = frozenset(triggers)
        self._sum_limit = cusum_limit(0.5, run_length)
        self._sessions: dict[str, int] = {}
        self.skipped = 0
        self._begin(None, 0)

    def _begin(self, version: int | None, block: int) -> None:
        self._version = version
        self._first = block
        self._pending: list[dict[str, Any]] = []
        self._alarms: dict[str, Alarm] = {}
        self._cusum = Cusum(0.5)
        self._baseline: dict[str, Any] | None = None
        self._quantiles = None
        if version is not None and self._reference is not None:
            self._quantiles = self._reference(version)
        self.current: dict[str, Finding] = {}

    @property
    def version(self) -> int | None:
        """The version that is followed."""
        return self._version

    @property
    def wants_round(self) -> bool:
        """Whether an alarm stands that a calibration round answers."""
        return any(a.raised and kind in self._triggers for kind, a in self._alarms.items())

    def feed(self, records: Iterable[Mapping[str, Any]]) -> list[Finding]:
        """Takes in records; those that it knows already are passed over.

        Args:
          records: of `read_records` for one filter.

        Returns:
          What was raised or cleared, in order of blocks.

        Raises:
          ConfigError: the records are of several filters.
        """
        records = list(records)
        names = sorted({r["name"] for r in records})
        if len(names) > 1:
            raise ConfigError(
                f"records are of filters {names}, expected one; give each filter a monitor."
            )
        new = [r for r in records if r["sequence"] > self._sessions.get(r["session"], -1)]
        findings: list[Finding] = []
        for record in sorted(new, key=lambda r: (r["first_block"], r["session"], r["sequence"])):
            known = self._sessions.pop(record["session"], -1)
            self._sessions[record["session"]] = max(known, record["sequence"])
            while len(self._sessions) > _SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            findings += self._take(dict(record))
        return findings

    def agreement(self, block: int, rho: float, low: float, high: float) -> list[Finding]:
        """Takes in a `rank_agreement` of the version that is followed.

        Returns:
          What was raised or cleared: raised when even the upper confidence limit is too low.
        """
        if not -1 <= low <= high <= 1:
            raise ConfigError(f"low is {low!r} and high {high!r}, expected -1 <= low <= high <= 1.")
        above = high < self._min_agreement
        once = Alarm(needed=1, among=1, clear_after=1)
        return self._look("rank_agreement", block, rho, self._min_agreement, above, once)

    def _take(self, record: dict[str, Any]) -> list[Finding]:
        version = record["version"]
        findings: list[Finding] = []
        if self._version is not None and version < self._version:
            # Workers finish their blocks at different times; an older version tells nothing now.
            self.skipped += 1
            return findings
        if version != self._version:
            for kind, alarm in self._alarms.items():
                if alarm.raised:
                    last = self.current[kind]
                    findings.append(
                        dataclasses.replace(last, block=record["first_block"], state="cleared")
                    )
            self._begin(version, record["first_block"])
        self._pending.append(record)
        if sum(_scored(r) for r in self._pending) < self._min_windows and record["scores"]:
            return findings
        look = merge(self._pending)
        self._pending = []
        return findings + self._examine(look)

    def _examine(self, record: dict[str, Any]) -> list[Finding]:
        block = record["last_block"]
        findings = self._scores(record, block)
        if self._target is not None and record["windows"]:
            miss = abs(record["kept"] / record["windows"] - self._target)
            limit = self._tolerance + record["blocks"] / record["windows"]
            findings += self._look("keep_ratio", block, miss, limit, miss > limit)
        if self._max_age is not None:
            age = block - self._first + 1
            once = Alarm(needed=1, among=1, clear_after=1)
            findings += self._look("age", block, age, self._max_age, age > self._max_age, once)
        return findings + self._features(record, block)

    def _scores(self, record: dict[str, Any], block: int) -> list[Finding]:
        sketch = ScoreSketch.from_record(record)
        if sketch is None:
            return []
        findings: list[Finding] = []
        n = max(int(sketch.count / self._per_sample), 1)
        m = self._reference_windows
        counts, shares = sketch.bins, None
        if self._quantiles is not None:
            counts, shares = merge_atoms(sketch.bins, self._quantiles)
        if len(counts) > 1:
            options = {"bins": len(counts), "reference": m, "level": self._level}
            for kind, statistic, limit_of in (("psi", psi, psi_limit), ("ks", ks, ks_limit)):
                value, limit = statistic(counts, shares), limit_of(n, **options)
                findings += self._look(kind, block, value, limit, value > limit)
        if self._quantiles is not None:
            mean, deviation = reference_moments(self._quantiles)
            if deviation > 0:
                shift = (sketch.mean - mean) / deviation
                # The reference's own error lasts as long as the version and would add up.
                dead = _REFERENCE_ERRORS / m**0.5
                value = max(abs(shift) - dead, 0.0) * n**0.5
                self._cusum = self._cusum.add(value if shift > 0 else -value)
                # A cap, or a long drift would take as long to clear.
                cap = 2 * self._sum_limit
                self._cusum = dataclasses.replace(
                    self._cusum, high=min(self._cusum.high, cap), low=min(self._cusum.low, cap)
                )
                value, limit = self._cusum.value, self._sum_limit
                once = dataclasses.replace(self._alarm, needed=1, among=1)
                findings += self._look("mean", block, value, limit, value > limit, once)
        return findings

    def _features(self, record: dict[str, Any], block: int) -> list[Finding]:
        features = record["features"]
        if self._baseline is None or self._baseline["blocks"] < _BASELINE_BLOCKS:
            whole = [record] if self._baseline is None else [self._baseline, record]
            self._baseline = merge(whole)
            return []
        before = self._baseline["features"]
        pairs = [
            (name, before[name], after)
            for name, after in features.items()
            if name in before and min(before[name]["count"], after["count"]) >= 2
        ]
        findings = []
        for name, old, new in pairs:
            # Many features give many chances of a false alarm.
            value, limit = mean_shift(old, new, level=self._level / len(pairs))
            findings += self._look(f"feature:{name}", block, value, limit, abs(value) > limit)
        return findings

    def _look(
        self,
        kind: str,
        block: int,
        value: float,
        limit: float,
        above: bool,
        alarm: Alarm | None = None,
    ) -> list[Finding]:
        before = self._alarms.get(kind, alarm or self._alarm)
        after = before.observe(above)
        self._alarms[kind] = after
        state = "raised" if after.raised else "quiet"
        finding = Finding(kind, int(block), float(value), float(limit), state)
        self.current[kind] = finding
        if after.raised == before.raised:
            return []
        return [finding if after.raised else dataclasses.replace(finding, state="cleared")]

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON types."""
        return {
            "format": 1,
            "version": self._version,
            "first_block": self._first,
            "skipped": self.skipped,
            "sessions": dict(self._sessions),
            "pending": list(self._pending),
            "cusum": dataclasses.asdict(self._cusum),
            "baseline": self._baseline,
            "alarms": {
                kind: dataclasses.asdict(a) | {"recent": list(a.recent)}
                for kind, a in self._alarms.items()
            },
            "current": {kind: dataclasses.asdict(f) for kind, f in self.current.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
          StateMismatch: it is not the state of a monitor of this format.
        """
        try:
            if state["format"] != 1:
                raise ValueError(f"format is {state['format']!r}")
            self._begin(state["version"], state["first_block"])
            self.skipped = state["skipped"]
            self._sessions = dict(state["sessions"])
            self._pending = list(state["pending"])
            self._cusum = Cusum(**state["cusum"])
            self._baseline = state["baseline"]
            self._alarms = {
                kind: Alarm(**fields | {"recent": tuple(fields["recent"])})
                for kind, fields in state["alarms"].items()
            }
            self.current = {kind: Finding(**f) for kind, f in state["current"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise StateMismatch(
                f"The monitor's state cannot be read ({error}), expected what Monitor.state() "
                "returned; start without it."
            ) from error


def _scored(record: Mapping[str, Any]) -> int:
    return 0 if record["scores"] is None else record["scores"]["count"]
