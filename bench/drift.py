"""Drift: how soon a change of the stream is seen and answered, and what a stale scorer costs.

python -m bench.drift            run (about half an hour on two cores), store, print the table
python -m bench.drift --table    print the table of the stored record

Everything is the product: a grain stream through `score_filter` (a quarter of every 512 windows
kept, versions may change every 4 blocks), its statistics and its spool, the attendant that follows
them, rounds of `Calibrator` from the spooled windows and the parameters of the moment. Training,
filter and calibration take turns in one process, so that delays are counted in blocks.

* pool: the stream (mixture world) holds 40 % PubMed of 1976-79, the target, and 60 % BBC news. At
  block 48 two thirds of the news give way to PubMed windows whose tokens were shuffled within
  fours, a kind of damage that no scorer has seen. Arms from the same parameters at the switch: live
  (answers alarms), stale (the first version for ever), random.
* target: the same stream, but at block 48 the target becomes BBC news. The stream's statistics
  cannot show that: the next round, which a schedule asks for every 24 blocks, compares the running
  version with fresh labels of the fixed reference pool. Its labels are pooled with none of the old
  target.
* quiet: 10^6 windows of the first stream, without any change, drawn anew from windows that no
  scorer was fitted on. Alarms are counted.

Agreement is the rank correlation of a version with fresh metagradients (T=48, 4 trajectories) of
windows that it was not fitted on, before the switch and at the end.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.readme import README, replaced
from bench.record import environment, say, write_record

RECORD = Path(__file__).parent / "records" / "drift.json"

SEEDS = 1
BLOCK, KEEP, SWAP = 512, 0.25, 4
BEFORE, AFTER = 48, 72  # blocks
SCHEDULE = 24  # blocks between rounds, where the target changes
QUIET_WINDOWS = 1_000_000
JUDGED = 3072
OPTIONS: dict[str, Any] = {
    "horizon": 48,
    "trajectories": 2,
    "batch_windows": 32,
    "learning_rate_scale": 1.0,
    "labels": 6144,
    "keep_ratio": KEEP,
    "gate_steps": 24,
    "pooled_rounds": 2,
}
NEWEST = 8192


def measure() -> dict[str, Any]:
    """Runs the three parts; JSON types only."""
    from bench.worlds import base_proxy, mixture

    world = mixture()
    proxy = base_proxy(world)
    pools = _Pools(world)
    switches = [_pool_switch(world, proxy, pools, seed) for seed in range(SEEDS)]
    return {
        "pool": [part for part, _ in switches],
        "target": _target_switch(world, proxy, pools),
        "quiet": _quiet(pools, switches[0][1]),
        "config": {
            "block_windows": BLOCK,
            "keep_ratio": KEEP,
            "swap_every_blocks": SWAP,
            "before_blocks": BEFORE,
            "after_blocks": AFTER,
            "calibration": OPTIONS,
            "newest_windows": NEWEST,
        },
        "environment": environment(),
    }


class _Pools:
    """Windows of each kind, in parts that are never mixed."""

    def __init__(self, world):
        everything = np.concatenate([world.stream, world.base])
        classes = np.concatenate([world.classes, _classes_of_base(world)])
        good, news = everything[classes == 0], everything[classes == 1]
        self.live = {"good": good[:12_000], "news": news[:16_000]}
        self.quiet = {"good": good[12_000:22_000], "news": news[18_000:]}
        self.judge = {"good": good[22_000:24_000], "news": news[16_000:18_000]}
        # Their sources are windows of no other part.
        damaged = _damaged(good[24_000:])
        kept_back = int(0.4 * JUDGED)
        self.damaged, self.judge["damaged"] = damaged[:-kept_back], damaged[-kept_back:]

    def blocks(self, rng: np.random.Generator, count: int, switched: bool) -> np.ndarray:
        """`(count x 512, 65)` windows of the stream before or after the switch."""
        shares = {"good": 0.4, "news": 0.2 if switched else 0.6}
        total = count * BLOCK
        parts = []
        for name, share in shares.items():
            source = self.live[name]
            parts.append(source[rng.integers(0, len(source), round(share * total))])
        if switched:
            rest = total - sum(map(len, parts))
            parts.append(self.damaged[rng.integers(0, len(self.damaged), rest)])
        windows = np.concatenate(parts)
        return windows[rng.permutation(len(windows))][:total]

    def judged(self, switched: bool) -> np.ndarray:
        """Windows for agreement, in the stream's shares; no scorer is fitted on them."""
        news, bad = (0.2, 0.4) if switched else (0.6, 0.0)
        return np.concatenate(
            [
                self.judge["good"][: int(0.4 * JUDGED)],
                self.judge["news"][: int(news * JUDGED)],
                self.judge["damaged"][: int(bad * JUDGED)],
            ]
        )


def _classes_of_base(world) -> np.ndarray:
    from bench.worlds import LENGTH, VOCAB
    from metagrad_filter.demo import data

    return data.build_world(length=LENGTH, vocab_size=VOCAB).classes[: len(world.base)]


def _damaged(windows: np.ndarray) -> np.ndarray:
    """Tokens shuffled within fours: local order is lost, the words stay."""
    rng = np.random.default_rng(5)
    out = windows.copy()
    body = out[:, 1:].reshape(len(out), -1, 4)
    out[:, 1:] = rng.permuted(body, axis=2).reshape(len(out), -1)
    return out


class _Live:
    """One run: filter, statistics, spool, training, alarms and rounds, a block at a time."""

    def __init__(self, folder: Path, proxy, target, windows: np.ndarray, *, answers: bool):
        import grain

        import metagrad_filter as mgf
        from bench.worlds import LIVE
        from metagrad_filter.calibration.attend import Attendant
        from metagrad_filter.demo.training import continued_state

        self.folder, self.proxy = folder, proxy
        self.state = continued_state(proxy)
        self.rates = np.full(2048, LIVE, np.float32)
        self.steps = self.block = 0
        self.answers = answers
        ds = mgf.score_filter(
            grain.MapDataset.source([{"tokens": window} for window in windows]).to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
            ),
            folder,
            keep_ratio=KEEP,
            windows=mgf.TextWindows("tokens"),
            block_windows=BLOCK,
            swap_every_blocks=SWAP,
            name="train",
            spool_share=1.0,
            annotate=True,
        )
        self.batches = iter(ds.batch(64))
        self.attendant = Attendant(folder, ask=answers)
        self.target = target
        self.calibrator = None
        self.versions: list[int] = []
        self.rounds: list[dict[str, Any]] = []
        self.alarms: list[tuple[int, str]] = []

    def calibrate(self, reason: str) -> dict[str, Any]:
        """A round from the spooled windows and the parameters of the moment."""
        import metagrad_filter as mgf

        if self.calibrator is None:
            self.calibrator = mgf.Calibrator(
                self.folder,
                proxy=self.proxy,
                target=self.target,
                windows=mgf.SpooledWindows(self.folder, "train", newest=NEWEST),
                config=mgf.CalibrationConfig(**OPTIONS),
            )
        params, opt_state = self.state
        self.calibrator.follow(self.steps, params, opt_state)
        report = self.calibrator.round().to_json()
        self.attendant.round_ended(report)
        self.rounds.append({"block": self.block, "reason": reason, **_short(report)})
        say(f"block {self.block}: {reason}: {_short(report)}")
        return report

    def advance(self, blocks: int, every: int | None = None) -> None:
        """Trains through blocks; answers requests, and a schedule where there is one."""
        from metagrad_filter.calibration.requests import waiting_requests
        from metagrad_filter.demo.training import train

        for _ in range(blocks):
            taken = [next(self.batches) for _ in range(round(BLOCK * KEEP) // 64)]
            tokens = np.stack([batch["tokens"] for batch in taken])
            self.versions.append(int(taken[0]["scorer_version"][0]))
            self.state = train(
                self.proxy.loss, self.proxy.optimizer, self.rates, self.state, tokens
            )
            self.steps += len(tokens)
            self.block += 1
            for line in self.attendant.look():
                self.alarms.append((self.block, line))
            waiting = waiting_requests(self.folder) if self.answers else []
            if waiting:
                self.calibrate("an alarm asked")
                for path in waiting:
                    path.unlink()
            elif every and self.block % every == 0:
                self.calibrate("the schedule")


def _short(report: dict[str, Any]) -> dict[str, Any]:
    fields = ("version", "reason", "strength", "reliability", "rank_correlation", "agreement")
    return {name: report[name] for name in fields}


def _pool_switch(world, proxy, pools: _Pools, seed: int):
    """Before and after a change of the pool; returns the record and the first version's scorer."""
    from bench.worlds import report_loss, target_of
    from metagrad_filter.registry import Registry

    rng = np.random.default_rng([23, seed])
    windows = np.concatenate([pools.blocks(rng, BEFORE, False), pools.blocks(rng, AFTER + 8, True)])
    target = target_of(world)
    with tempfile.TemporaryDirectory() as folder:
        live = _Live(Path(folder), proxy, target, windows, answers=True)
        live.advance(24)
        live.calibrate("the first round")
        live.advance(BEFORE - 24)
        false = len(live.alarms)
        switch = live.state
        live.advance(AFTER)
        registry = Registry(folder)
        scorers = {v: registry.load(v) for v in registry.versions()}
        end, rounds, alarms = live.state, live.rounds, live.alarms
        seen, versions = live.versions, scorers
    first, last = versions[1], versions[max(versions)]
    after = windows[BEFORE * BLOCK : (BEFORE + AFTER) * BLOCK]
    arms = {"live": report_loss(world, proxy, end[0])}
    for name, scorer in (("stale", first), ("random", None)):
        params = _continue(proxy, switch, after, scorer, seed)
        arms[name] = report_loss(world, proxy, params)
    before = _agreement(world, proxy.at(*_start(proxy)), pools, False, [first])
    stale, answered = _agreement(world, proxy.at(*end), pools, True, [first, last])
    later = [block for block, line in alarms if block > BEFORE and "limit" in line]
    answers = [r for r in rounds if r["block"] > BEFORE]
    published = [i + 1 for i, r in enumerate(answers) if r["version"] is not None]
    record = {
        "seed": seed,
        "alarms_before": false,
        "alarm_delay_blocks": later[0] - BEFORE if later else None,
        "rounds_to_version": published[0] if published else None,
        "rounds": rounds,
        "alarms": [{"block": block, "line": line} for block, line in alarms],
        "versions": seen,
        "agreement": {"before": before[0], "stale": stale, "answered": answered},
        "losses": arms,
    }
    say(f"pool switch {seed}: {record['agreement']} {arms} {record['alarm_delay_blocks']}")
    return record, first


def _start(proxy):
    from metagrad_filter.demo.training import continued_state

    return continued_state(proxy)


def _continue(proxy, state, windows: np.ndarray, scorer, seed: int):
    """Trains on through the blocks after the switch with a fixed scorer, or none."""
    from bench.own_pool import filtered
    from bench.worlds import LIVE
    from metagrad_filter.demo.training import train

    order = np.arange(len(windows))
    scores = None if scorer is None else scorer.score(windows)
    strength = 0.0 if scorer is None else scorer.strength
    kept = windows[order[filtered(scores, order, KEEP, strength, seed)]]
    batches = kept[: len(kept) // 64 * 64].reshape(-1, 64, kept.shape[1])
    rates = np.full(2048, LIVE, np.float32)
    return train(proxy.loss, proxy.optimizer, rates, state, batches)[0]


def _agreement(world, proxy, pools: _Pools, switched: bool, scorers) -> list[float]:
    """Rank correlation of scorers with fresh labels of windows that none was fitted on."""
    from bench.worlds import probe_halves, sweep_probes
    from metagrad_filter.statistics import rank_correlation

    raw = pools.blocks(np.random.default_rng(31), 16, switched)
    probes = sweep_probes(world, proxy, horizon=48, trajectories=4, scale=1.0, windows=raw)
    judged = pools.judged(switched)
    labels = probe_halves(proxy, probes, judged).sum(axis=0)
    return [rank_correlation(scorer.score(judged), labels) for scorer in scorers]


def _target_switch(world, proxy, pools: _Pools) -> dict[str, Any]:
    """The target becomes BBC news in mid-stream."""
    import metagrad_filter as mgf
    from bench.worlds import target_of

    rng = np.random.default_rng(29)
    windows = pools.blocks(rng, BEFORE + AFTER + 8, False)
    news = pools.quiet["news"][-2048:]
    with tempfile.TemporaryDirectory() as folder:
        live = _Live(Path(folder), proxy, target_of(world), windows, answers=True)
        live.advance(24)
        live.calibrate("the first round")
        live.advance(BEFORE - 24, SCHEDULE)
        live.target, live.calibrator = mgf.HeldOutLoss(news), None
        live.advance(AFTER - 24, SCHEDULE)
        return {
            "rounds": live.rounds,
            "alarms": [{"block": block, "line": line} for block, line in live.alarms],
            "raised": _raised(Path(folder)),
        }


def _raised(folder: Path) -> list[dict[str, Any]]:
    path = folder / "monitor" / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _quiet(pools: _Pools, scorer) -> dict[str, Any]:
    """A million windows without a change, through the filter and the attendant."""
    import grain

    import metagrad_filter as mgf
    from metagrad_filter.calibration.attend import Attendant

    with tempfile.TemporaryDirectory() as folder:
        mgf.Registry(folder).publish(scorer)
        rng = np.random.default_rng(37)
        good, news = pools.quiet["good"], pools.quiet["news"]
        every = np.concatenate([good, news])
        total = -(-QUIET_WINDOWS // BLOCK) * BLOCK
        share = np.where(rng.random(total) < 0.4, 0, 1)
        index = np.where(
            share == 0,
            rng.integers(0, len(good), total),
            len(good) + rng.integers(0, len(news), total),
        )
        ds = mgf.score_filter(
            grain.MapDataset.source(index.tolist())
            .map(lambda i: {"tokens": every[i]})
            .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)),
            folder,
            keep_ratio=KEEP,
            windows=mgf.TextWindows("tokens"),
            block_windows=BLOCK,
            name="quiet",
        )
        attendant, lines = Attendant(folder, ask=True), []
        for i, _ in enumerate(ds.batch(BLOCK)):
            if i % 16 == 0:
                lines += attendant.look()
        del ds
        lines += attendant.look()
        looks = attendant.monitors["quiet"]
        found = {
            "windows": total,
            "blocks": total // BLOCK,
            "alarms": lines,
            "last": {kind: f.value / f.limit for kind, f in looks.current.items()},
        }
    say(f"quiet: {found}")
    return found


def table(record: dict[str, Any]) -> str:
    """Delays, agreement and losses as Markdown."""
    lines = [
        "| change of the pool, seed | alarm after (blocks) | new version in round | "
        "agreement before / stale / answered | loss live / stale / random |",
        "|---|---:|---:|---|---|",
    ]
    for part in record["pool"]:
        agreement, losses = part["agreement"], part["losses"]
        lines.append(
            f"| {part['seed']} | {part['alarm_delay_blocks']} | {part['rounds_to_version']} | "
            f"{agreement['before']:.2f} / {agreement['stale']:.2f} / {agreement['answered']:.2f} | "
            f"{losses['live']:.4f} / {losses['stale']:.4f} / {losses['random']:.4f} |"
        )
    quiet, target = record["quiet"], record["target"]
    found = [
        f"{entry['agreement']['rho']:.2f} at block {entry['block']}"
        for entry in target["rounds"]
        if entry["agreement"]
    ]
    raised = [a["kind"] for a in target["raised"] if a["state"] == "raised"]
    lines += [
        "",
        f"The target becomes news at block {record['config']['before_blocks']}: the running "
        f"version's agreement with fresh labels was {', '.join(found)}; alarms raised: "
        f"{', '.join(raised) or 'none'}.",
        "",
        f"{len(quiet['alarms'])} alarms in {quiet['windows']:,} windows without a change.",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--table"]):
        sys.exit(f"bench.drift: unknown arguments {arguments}; expected none or --table")
    if not arguments:
        write_record(RECORD, measure())
    text = table(json.loads(RECORD.read_text()))
    README.write_text(replaced(README.read_text(), "drift-table", text))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
