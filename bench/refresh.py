"""Once, again and again, or on its own policy: calibration over a whole training run, and its cost.

python -m bench.refresh            run (about an hour on two cores), store, print the tables
python -m bench.refresh --compute  the part on compute alone, into the stored record
python -m bench.refresh --table    print the tables of the stored record

World (`bench.worlds.dirty`): 40 % PubMed of 2021 (the target), 20 % BBC news, 40 % shuffled
PubMed. The base is early in the stable phase, at the full learning rate; from it every arm trains
976 steps of 64 windows, a quarter of two passes over the stream, in four intervals: three at the
full rate, the last one falling to a twentieth. Versions take over at the start of an interval.

* random: a uniform quarter.
* one-shot: one round before the first interval, its version throughout.
* refreshed: a round at the start of each interval from the parameters and moments reached there,
  on the raw stream; labels of all rounds pooled with weights by age (the default of the product).
* on-policy: as refreshed, trajectories on what the versions so far would keep.
* on-target only: the ceiling, by the known class.

Rounds are the product's own (`Calibrator.round`), with the gate. They follow the arm of seed 0;
the other seeds take the same versions. Every cost is counted in training steps of 64 windows: a
window's gradient is 1, see the reports of the rounds; scoring the stream is not counted, it takes
microseconds a window. How much compute the filter needs for random's final loss is answered by
one-shot runs with a schedule of their own over fewer steps, plus all of their calibration, once
with the rounds above and once (*frugal*) with cheaper ones: T=64, 2,048 labels, 16 gate steps.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.readme import README, replaced
from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "refresh.json"

SEEDS, INTERVALS, INTERVAL_STEPS, KEEP = 3, 4, 244, 0.25
BASE_STEPS = 768
LAST_SHARE = 1 / 20  # of the full rate, at the end of a run
SHORTER = (366, 488)
POLICIES = ("one-shot", "refreshed", "on-policy")
FRUGAL_STEPS = (244, 366)
OPTIONS: dict[str, Any] = {
    "horizon": 96,
    "trajectories": 2,
    "batch_windows": 16,
    "learning_rate_scale": 0.25,
    "labels": 4096,
    "reference_windows": 0,
    "keep_ratio": KEEP,
    "gate_strengths": (math.inf,),
    "gate_steps": 48,
}


def measure() -> dict[str, Any]:
    """Runs every arm; JSON types only."""
    from bench.worlds import PEAK, base_proxy, dirty, report_loss

    world = dirty()
    proxy = base_proxy(world, "stable", steps=BASE_STEPS)
    run = _Run(world, proxy)
    base_loss = report_loss(world, proxy, proxy.params)
    say(f"base {base_loss:.4f}, stream {len(world.stream)} windows")
    arms: dict[str, Any] = {}
    for name in ("random", "on-target only"):
        choose = run.uniform if name == "random" else run.on_target
        arms[name] = {"losses": [run.train(choose, seed)[0] for seed in range(SEEDS)]}
        say(f"{name} {arms[name]}")
    shared: dict[str, Any] = {}
    for name in POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            versions, reports = run.calibrated(name, Path(folder), shared)
        losses = [run.final(versions, seed) for seed in range(SEEDS)]
        arms[name] = {
            "losses": losses,
            "rounds": reports,
            "kept": run.kept_shares(versions),
            "calibration_steps": sum(_steps(report) for report in reports),
        }
        say(f"{name} {losses} {arms[name]['kept']} {arms[name]['calibration_steps']:.0f} steps")
    first = shared["first"]
    shorter = []
    for steps in SHORTER:
        found = [run.short(first, steps, seed) for seed in range(SEEDS)]
        shorter.append({"steps": steps, "losses": found})
        say(f"one-shot over {steps} steps: {found}")
    return {
        "arms": arms,
        "shorter": shorter,
        "base_loss": base_loss,
        "config": {
            "seeds": SEEDS,
            "intervals": INTERVALS,
            "interval_steps": INTERVAL_STEPS,
            "keep_ratio": KEEP,
            "learning_rate": PEAK,
            "calibration": {**OPTIONS, "gate_strengths": ["inf"]},
            "stream_windows": len(world.stream),
        },
        "environment": environment(),
    }


def measure_frugal() -> dict[str, Any]:
    """A cheaper round, and short runs with its version; JSON types only."""
    import metagrad_filter as mgf
    from bench.worlds import base_proxy, dirty

    world = dirty()
    run = _Run(world, base_proxy(world, "stable", steps=BASE_STEPS))
    # Twice the target windows of the other rounds: halves of 512 each leave too little agreement.
    held = np.concatenate([world.target, world.gate[512:1536], world.gate[:512]])
    options = {**OPTIONS, "horizon": 64, "labels": 2048, "gate_steps": 16}
    with tempfile.TemporaryDirectory() as folder:
        calibrator = mgf.Calibrator(
            folder,
            proxy=run.proxy,
            target=mgf.HeldOutLoss(held, gate_share=512 / len(held)),
            windows=world.stream,
            config=mgf.CalibrationConfig(**options),
        )
        report = calibrator.round().to_json()
        newest = calibrator.registry.latest()
        scorer = None if newest is None else calibrator.registry.load(newest)
    say(f"frugal round: {report['reason']}, {_steps(report):.0f} steps")
    shorter = []
    for steps in FRUGAL_STEPS:
        found = [run.short(scorer, steps, seed) for seed in range(SEEDS)]
        shorter.append({"steps": steps, "losses": found})
        say(f"frugal over {steps} steps: {found}")
    return {"round": report, "calibration_steps": _steps(report), "shorter": shorter}


class _Run:
    """Training runs from one base over the intervals of one stream."""

    def __init__(self, world, proxy):
        from bench.worlds import BATCH, PEAK

        self.world, self.proxy = world, proxy
        self.batch = BATCH
        self.steps = INTERVALS * INTERVAL_STEPS
        self.rates = self.schedule(self.steps, PEAK)

    def schedule(self, steps: int, peak: float) -> np.ndarray:
        """The full rate for three quarters, then down to a twentieth."""
        return np.interp(
            np.arange(steps), [0, 0.75 * steps, steps], [peak, peak, peak * LAST_SHARE]
        ).astype(np.float32)

    def stream(self, seed: int) -> np.ndarray:
        """Positions in the stream, in the order in which a seed reads it."""
        from bench.worlds import passes

        rng = np.random.default_rng([17, seed])
        return passes(rng, len(self.world.stream), round(self.steps * self.batch / KEEP))

    def intervals(self, seed: int) -> Iterator[np.ndarray]:
        yield from np.array_split(self.stream(seed), INTERVALS)

    def uniform(self, order: np.ndarray, seed: int, interval: int) -> np.ndarray:
        return order[_kept(None, order, 0.0, seed, interval)]

    def on_target(self, order: np.ndarray, seed: int, interval: int) -> np.ndarray:
        good = order[self.world.classes[order] == 0]
        return good[: round(len(order) * KEEP)]

    def train(self, choose, seed: int, state=None, only: range | None = None):
        """Trains through intervals; returns the report loss and the state."""
        from bench.worlds import report_loss
        from metagrad_filter.demo.training import continued_state, train

        state = continued_state(self.proxy) if state is None else state
        for i, order in enumerate(self.intervals(seed)):
            if only is not None and i not in only:
                continue
            windows = self.world.stream[choose(order, seed, i)[: INTERVAL_STEPS * self.batch]]
            batches = windows.reshape(INTERVAL_STEPS, self.batch, -1)
            state = train(self.proxy.loss, self.proxy.optimizer, self.rates, state, batches)
        return report_loss(self.world, self.proxy, state[0]), state

    def calibrated(self, policy: str, folder: Path, shared: dict[str, Any]):
        """Runs the rounds of a policy along the arm of seed 0: scorers by interval, reports."""
        import metagrad_filter as mgf
        from bench.worlds import target_of

        calibrator = mgf.Calibrator(
            folder,
            proxy=self.proxy,
            target=target_of(self.world),
            windows=self.world.stream,
            config=mgf.CalibrationConfig(**OPTIONS),
        )
        versions, reports, state = [], [], None
        for i in range(INTERVALS):
            if i == 0 or policy != "one-shot":
                if state is not None:
                    calibrator.follow(i * INTERVAL_STEPS, *state)
                if policy == "on-policy" and i:
                    calibrator.configure(estimator="on_policy")
                report = calibrator.round().to_json()
                reports.append(report)
            newest = calibrator.registry.latest()
            versions.append(None if newest is None else calibrator.registry.load(newest))
            if i == 0:
                shared.setdefault("first", versions[0])
            if i + 1 < INTERVALS and policy != "one-shot":
                choose = self.by(versions)
                _, state = self.train(choose, 0, state, range(i, i + 1))
        return versions, reports

    def by(self, versions):
        """Chooses with the version of each interval."""

        def choose(order: np.ndarray, seed: int, interval: int) -> np.ndarray:
            scorer = versions[interval]
            if scorer is None:
                return self.uniform(order, seed, interval)
            scores = scorer.score(self.world.stream[order])
            return order[_kept(scores, order, scorer.strength, seed, interval)]

        return choose

    def final(self, versions, seed: int) -> float:
        return self.train(self.by(versions), seed)[0]

    def kept_shares(self, versions) -> list[float]:
        """Share on target of what each interval keeps, for seed 0."""
        choose = self.by(versions)
        return [
            float(np.mean(self.world.classes[choose(order, 0, i)] == 0))
            for i, order in enumerate(self.intervals(0))
        ]

    def short(self, scorer, steps: int, seed: int) -> float:
        """The one-shot filter over fewer steps with a whole schedule."""
        from bench.worlds import PEAK, arm, report_loss

        order = self.stream(seed)[: round(steps * self.batch / KEEP)]
        kept = self.by([scorer])(order, seed, 0)[: steps * self.batch]
        params = arm(self.proxy, self.world.stream[kept], self.schedule(steps, PEAK))
        return report_loss(self.world, self.proxy, params)


def _kept(scores, order: np.ndarray, strength: float, seed: int, interval: int) -> np.ndarray:
    from bench.own_pool import BLOCK
    from metagrad_filter.selection import keep_blocks

    return keep_blocks(
        scores if strength else None,
        len(order),
        block_windows=BLOCK,
        keep_ratio=KEEP,
        strength=strength,
        seed=seed,
        name=f"interval-{interval}",
    )


def _steps(report: dict[str, Any]) -> float:
    """A round's cost in training steps of 64 windows."""
    from bench.worlds import BATCH

    return sum(report["gradients"].values()) / BATCH


def compute(record: dict[str, Any], shorter, calibration: float) -> dict[str, Any] | None:
    """The shortest run that reaches random's final loss, everything counted."""
    random = np.mean(record["arms"]["random"]["losses"])
    whole = record["config"]["intervals"] * record["config"]["interval_steps"]
    for row in shorter:
        if np.mean(row["losses"]) <= random:
            total = row["steps"] + calibration
            return {"steps": row["steps"], "calibration": calibration, "share": total / whole}
    return None


def table(record: dict[str, Any]) -> str:
    """Final losses and costs as Markdown."""
    arms = record["arms"]
    random = np.mean(arms["random"]["losses"])
    ceiling = np.mean(arms["on-target only"]["losses"])
    whole = record["config"]["intervals"] * record["config"]["interval_steps"]
    lines = [
        "| selection | final loss | recovered | on target, by interval | calibration / training |",
        "|---|---:|---:|---|---:|",
    ]
    for name, found in arms.items():
        losses = np.asarray(found["losses"])
        kept = " ".join(f"{share:.2f}" for share in found.get("kept", []))
        cost = found.get("calibration_steps")
        lines.append(
            f"| {name} | {losses.mean():.4f} ± {losses.std(ddof=1):.4f} | "
            f"{(random - losses.mean()) / (random - ceiling):.2f} | {kept} | "
            f"{'' if cost is None else f'{cost / whole:.0%}'} |"
        )
    kinds = {"the same round": (record["shorter"], arms["one-shot"]["calibration_steps"])}
    if "frugal" in record:
        frugal = record["frugal"]
        kinds["a frugal round"] = (frugal["shorter"], frugal["calibration_steps"])
    for name, (shorter, calibration) in kinds.items():
        found = compute(record, shorter, calibration)
        tried = ", ".join(f"{row['steps']} ({np.mean(row['losses']):.4f})" for row in shorter)
        lines += ["", f"One-shot with {name} over fewer steps, final loss: {tried}."]
        if found:
            lines[-1] += (
                f" Random's final loss takes at most {found['steps']} of {whole} steps and "
                f"{found['calibration']:.0f} steps' worth of calibration, {found['share']:.0%} of "
                "random's compute."
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"], ["--compute"]):
        sys.exit(f"bench.refresh: unknown arguments {arguments}; expected none or --table")
    if arguments != ["--table"]:
        # The first part is stored before the second begins.
        if not arguments:
            write_record(RECORD, measure())
        write_record(RECORD, {**json.loads(RECORD.read_text()), "frugal": measure_frugal()})
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "refresh-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
