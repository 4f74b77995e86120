"""A run directory made by the product alone: a filter over a stream, versions, alarms, a fallback.

The stream is made of three kinds of sentences; labels are planted, so no metagradient is computed.
Unlike `example_run`, nothing here is written by hand but the reports of two rounds.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import metagrad_filter as mgf
from metagrad_filter.calibration.attend import Attendant
from metagrad_filter.calibration.gate import GateArm, GateResult
from metagrad_filter.calibration.reference import Agreement
from metagrad_filter.calibration.round import RoundReport
from metagrad_filter.calibration.validation import fall_back
from metagrad_filter.labels import LabelStore, RoundLabels
from metagrad_filter.scorer.fit import fit_scorer

LENGTH, BLOCK = 24, 64
WORDS = {
    "papers": "the trial shows that patients with this gene respond to treatment in most of cases",
    "web": "click here now and buy cheap shoes with free shipping only today best price ever",
    "code": "def return for if else while import class self none true false try except",
}
VOCABULARY = ["[UNK]", *sorted({word for words in WORDS.values() for word in words.split()})]


def tokenizer(path: Path) -> Path:
    """Writes a tokenizer.json whose ids are those of `VOCABULARY`."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    made = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(path))
    return path


def stream(n: int, shares: tuple[float, float, float], seed: int) -> list[dict]:
    """Returns `n` windows of the three sources in these shares, with some words of the others."""
    rng = np.random.default_rng(seed)
    names = list(WORDS)
    ids = {k: np.array([VOCABULARY.index(w) for w in v.split()]) for k, v in WORDS.items()}
    elements = []
    for kind in rng.choice(len(names), n, p=shares):
        own = ids[names[kind]][rng.integers(0, len(ids[names[kind]]), LENGTH)]
        strange = rng.integers(1, len(VOCABULARY), LENGTH)
        tokens = np.where(rng.random(LENGTH) < rng.uniform(0.1, 0.7), strange, own)
        elements.append({"tokens": tokens.astype(np.int32), "source": names[kind]})
    return elements


def fit(number: int, elements: list[dict]):
    """Returns a scorer of planted labels, better papers first, and stores the labels' halves."""
    windows = np.stack([e["tokens"] for e in elements])
    rng = np.random.default_rng(number)
    value = np.array([{"papers": 1.0, "code": 0.2, "web": -1.0}[e["source"]] for e in elements])
    halves = value + rng.normal(0, 0.5, (2, len(value)))
    scorer = fit_scorer(
        windows, halves.sum(axis=0), vocab_size=len(VOCABULARY), seed=number, pad_id=0
    )
    return scorer, RoundLabels(windows, halves.astype(np.float32))


def real_run(run_dir: Path, *, blocks: int = 256) -> Path:
    """Builds the run; about two seconds a hundred blocks of 64 windows."""
    registry, attendant = mgf.Registry(run_dir), Attendant(run_dir)
    even, shifted = (0.3, 0.5, 0.2), (0.1, 0.8, 0.1)
    quarter = blocks // 4 * BLOCK
    parts = [stream(quarter, even, 1), stream(quarter, even, 2)]
    parts += [stream(quarter, shifted, 3), stream(quarter, shifted, 4)]
    ds = grain.MapDataset.source([e for part in parts for e in part]).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    ds = mgf.score_filter(
        ds, run_dir, keep_ratio=0.25, windows=mgf.TextWindows("tokens"), name="train",
        block_windows=BLOCK, swap_every_blocks=16, source_key="source", spool_share=0.1,
    )  # fmt: skip
    (run_dir / "rounds").mkdir()
    kept = iter(ds)

    def read(quarters: float, kept=kept) -> None:
        for _ in range(int(quarters * quarter * 0.25)):
            next(kept)
        attendant.look()

    read(0.5)
    publish(run_dir, registry, 1, stream(1024, even, 11), 0.9, None)
    read(1.0)
    publish(run_dir, registry, 2, stream(1024, even, 12), 0.93, Agreement(0.71, 0.66, 0.75, 1, 256))
    read(0.75)
    registry.reject(None, "unreliable", {"round": 3, "reliability": 0.31})
    report(
        run_dir, 3, reliability=0.31, version=None, agreement=Agreement(0.58, 0.5, 0.64, 2, 256),
        reason="unreliable: split-half correlation 0.31 is below 0.5; raise trajectories",
    )  # fmt: skip
    read(0.75)
    assert fall_back(registry, "held-out loss 3.91 lies above its trend of 3.52 at step 4200") == 3
    read(1.0 - 1e-9)
    attendant.look()
    attendant.close()
    return run_dir


def publish(run_dir, registry, number, elements, reliability, agreement) -> None:
    scorer, labels = fit(number, elements)
    LabelStore(run_dir).append(number, labels)
    gate = GateResult((GateArm(2.0, 0.0123, 0.0031), GateArm(math.inf, 0.0214, 0.0052)), math.inf)
    metadata = {"round": number, "reliability": reliability, "gate": gate.to_json()}
    version = registry.publish(replace(scorer, strength=math.inf), metadata)
    report(
        run_dir, number, reliability=reliability, version=version, reason="published", gate=gate,
        agreement=agreement, rank_correlation=scorer.metadata["rank_correlation"], labels=1024,
        form=scorer.metadata["form"],
    )  # fmt: skip


def report(run_dir: Path, number: int, **fields) -> None:
    made = RoundReport(
        number, live_step=1000 * number, horizon=96, learning_rate_scale=0.1,
        gradients={"labels": 420.0, "fit": 0.0, "gate": 96.0},
        seconds={"trajectories": 61.2, "labels": 20.4, "fit": 3.1, "gate": 12.0}, **fields,
    )  # fmt: skip
    (run_dir / "rounds" / f"round-{number:06d}.json").write_text(json.dumps(made.to_json()))
