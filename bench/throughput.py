"""Tokens per second of the text scorer on one core, beside other scorers, in one run.

python -m bench.throughput            measure, store bench/records/throughput.json, fill the README
python -m bench.throughput --table    write the table from the stored record

Every engine lives in a process of its own, pinned to one core (`bench/peers/measure.py`), and they
take turns, so that noise hits all alike; an engine's figure is the best of its turns, and all turns
are in the record. Windows hold 256 or 1,024 ids of a vocabulary of 50,257. Two streams: `zipf`, ids
drawn with probability 1 / (rank + 2.7), as text has them; `uniform`, the worst case for caches.

Engines, each on what suits it best (strings ready where it reads strings, one "word" a token):

- ours: each preset with random weights, 64 windows a call; one window a call; float32 and float16
  tables; forced to AVX2 and to portable code; the numpy path.
- fastText (`fasttext-predict`), DCLM's settings: 256 dimensions, word bigrams, two labels.
- DSIR (`data-selection`): hashed unigrams and bigrams, 10,000 buckets, dot product.
- scikit-learn: HashingVectorizer (unigrams and bigrams, 2^20) and a linear SGD model.
- jax: a jitted embedding bag over the same hashed rows (2^18 x 16, float32), with its own hashing.

`limit` is what `bench/native/gather_limit.cpp` reads per second at random addresses of a table of
the same size, in the same run, in tokens: two rows (a unigram and a bigram) a token.

Packages: `pip install fasttext-predict data-selection scikit-learn`. `fasttext-predict` cannot
train, so its model is made once by a full build in another environment (`pip install
fasttext-numpy2-wheel`): `python -m bench.throughput --train-fasttext MODEL`, then
METAGRAD_FILTER_FASTTEXT=MODEL here. Peers that are not installed are left out of the record and
named in it.
"""

# pyright: reportMissingImports=false
# The peers are no part of the development environment.

from __future__ import annotations

import abc
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.measure import EngineProcess
from bench.readme import README, replaced
from bench.record import processor, versions, write_record

RECORD = Path(__file__).parent / "records" / "throughput.json"
FASTTEXT = "METAGRAD_FILTER_FASTTEXT"
VOCAB = 50_257
LENGTHS = (256, 1024)
STREAMS = ("zipf", "uniform")
BATCH = 64
SECONDS, ROUNDS = 0.25, 7
GRAMS = 2  # rows a token: its unigram and the bigram that it begins

# Name, preset (log2 of rows, columns, hidden units), dtype, windows a call, instruction set.
PRESETS = {
    "linear": (20, 1, 0),
    "embedding": (18, 16, 32),
    "small": (16, 32, 32),
    "large": (20, 32, 32),
}
OURS = [
    ("linear int8", "linear", "int8", BATCH, ""),
    ("embedding int8", "embedding", "int8", BATCH, ""),
    ("small int8", "small", "int8", BATCH, ""),
    ("large int8", "large", "int8", BATCH, ""),
    ("linear float32", "linear", "float32", BATCH, ""),
    ("embedding float32", "embedding", "float32", BATCH, ""),
    ("embedding float16", "embedding", "float16", BATCH, ""),
    ("linear int8, one window a call", "linear", "int8", 1, ""),
    ("embedding int8, one window a call", "embedding", "int8", 1, ""),
    ("linear int8, avx2", "linear", "int8", BATCH, "avx2"),
    ("embedding int8, avx2", "embedding", "int8", BATCH, "avx2"),
    ("linear int8, portable", "linear", "int8", BATCH, "portable"),
    ("linear int8, numpy", "linear", "int8", 2000, "numpy"),
]  # fmt: skip


def windows_of(stream: str, length: int, count: int) -> np.ndarray:
    """Returns `(count, length)` int32 ids, seeded."""
    rng = np.random.default_rng(7)
    if stream == "uniform":
        return rng.integers(0, VOCAB, (count, length)).astype(np.int32)
    weights = 1 / (np.arange(VOCAB) + 2.7)
    cumulative = np.cumsum(weights / weights.sum())
    ranks = np.searchsorted(cumulative, rng.random((count, length)))
    # Ids in no order of frequency, as a tokenizer gives them.
    return rng.permutation(VOCAB)[np.minimum(ranks, VOCAB - 1)].astype(np.int32)


def strings_of(windows: np.ndarray) -> list[str]:
    return [" ".join(f"w{token}" for token in window) for window in windows.tolist()]


class _Timed(abc.ABC):
    """Calls `score(part)` on parts of the data for a while; returns tokens a second."""

    def __init__(self, parts: list[Any], tokens: int):
        self.parts, self.tokens, self.next = parts, tokens, 0
        self.score(parts[0])

    @abc.abstractmethod
    def score(self, part: Any) -> Any:
        """Scores one part of the data."""

    def run(self) -> float:
        done, began = 0, time.perf_counter()
        while True:
            self.score(self.parts[self.next])
            self.next = (self.next + 1) % len(self.parts)
            done += 1
            taken = time.perf_counter() - began
            if taken > SECONDS:
                return done * self.tokens / taken


class Ours(_Timed):
    def __init__(self, preset: str, dtype: str, batch: int, isa: str, stream: str, length: int):
        if isa == "numpy":
            os.environ["METAGRAD_FILTER_NO_NATIVE"] = "1"
        elif isa:
            os.environ["METAGRAD_FILTER_ISA"] = isa
        self.scorer = random_scorer(preset, dtype)
        windows = windows_of(stream, length, max(2048, 2 * batch))
        super().__init__(np.split(windows, range(batch, len(windows), batch)), batch * length)

    def score(self, part: np.ndarray) -> np.ndarray:
        return self.scorer.score(part)


def random_scorer(preset: str, dtype: str) -> Any:
    """Returns a scorer of a preset's shape with random weights."""
    from metagrad_filter.scorer.scorer import Scorer

    bits, width, hidden = PRESETS[preset]
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    head: dict[str, Any] = {}
    if hidden:
        head = {
            "hidden_kernel": normal(width, hidden),
            "hidden_bias": normal(hidden),
            "output_kernel": normal(hidden),
        }
    if dtype == "int8":
        table = rng.integers(-127, 128, (1 << bits, width)).astype(np.int8)
        head["scale"] = np.full(width, 0.01, np.float32)
    else:
        table = normal(1 << bits, width).astype(dtype)
    return Scorer(VOCAB, 0, table, **head)


class FastText(_Timed):
    def __init__(self, stream: str, length: int):
        import fasttext

        fasttext.FastText.eprint = lambda *args: None
        self.model = fasttext.load_model(os.environ[FASTTEXT])
        super().__init__(strings_of(windows_of(stream, length, 256)), length)

    def score(self, part: str) -> Any:
        return self.model.predict(part)


class Dsir(_Timed):
    def __init__(self, stream: str, length: int):
        from data_selection.hashed_ngram_dsir import get_ngram_counts

        self.counts = get_ngram_counts
        self.log_ratio = np.random.default_rng(1).normal(size=10_000)
        super().__init__(strings_of(windows_of(stream, length, 64)), length)

    def score(self, part: str) -> float:
        return float(np.dot(self.log_ratio, self.counts(part, n=2, num_buckets=10_000)))


class ScikitLearn(_Timed):
    def __init__(self, stream: str, length: int):
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import SGDClassifier

        strings = strings_of(windows_of(stream, length, 4 * BATCH))
        self.vectorizer = HashingVectorizer(ngram_range=(1, 2), n_features=2**20)
        labels = np.arange(len(strings)) % 2
        self.model = SGDClassifier(max_iter=1, tol=1.0).fit(
            self.vectorizer.transform(strings), labels
        )
        parts = [strings[i : i + BATCH] for i in range(0, len(strings), BATCH)]
        super().__init__(parts, BATCH * length)

    def score(self, part: list[str]) -> Any:
        return self.model.decision_function(self.vectorizer.transform(part))


class Jax(_Timed):
    def __init__(self, stream: str, length: int):
        import jax
        import jax.numpy as jnp

        bits, width, _ = PRESETS["embedding"]
        table = jax.random.normal(jax.random.key(0), (1 << bits, width))
        head = jax.random.normal(jax.random.key(1), (width,))

        def rows(ids):
            ids = ids.astype(jnp.uint32)
            pairs = (ids[:-1] * jnp.uint32(0x85EBCA77)) ^ (ids[1:] * jnp.uint32(0xC2B2AE3D))
            return jnp.concatenate([ids * jnp.uint32(0x9E3779B1), pairs]) >> jnp.uint32(32 - bits)

        @jax.jit
        def score(windows):
            # One window at a time: a gather of the whole batch would not stay in any cache.
            return jax.lax.map(lambda ids: table[rows(ids)].mean(axis=0) @ head, windows)

        self.call = score
        windows = windows_of(stream, length, 8 * 256)
        super().__init__(np.split(windows, 8), 256 * length)

    def score(self, part: np.ndarray) -> Any:
        return np.asarray(self.call(part))


class Limit:
    """Random reads from a table of a preset's size, in tokens a second."""

    def __init__(self, program: str, preset: str):
        bits, width, _ = PRESETS[preset]
        self.command = [program, str(width << bits), str(width), "2000000", "3"]

    def run(self) -> float:
        printed = subprocess.run(self.command, capture_output=True, text=True, check=True).stdout
        return 1e9 / (GRAMS * float(printed.split()[0]))


PEERS = {
    "fastText, 256 dimensions (DCLM)": (FastText, "fasttext"),
    "DSIR, 10,000 buckets": (Dsir, "data_selection"),
    "scikit-learn hashing + SGD": (ScikitLearn, "sklearn"),
    "jax embedding bag 2^18 x 16": (Jax, "jax"),
}


def measure() -> dict[str, Any]:
    """Measures every engine on every stream and length; JSON types only."""
    missing = [
        name for name, (_, module) in PEERS.items() if importlib.util.find_spec(module) is None
    ]
    if FASTTEXT not in os.environ:
        missing += [name for name, (make, _) in PEERS.items() if make is FastText]
    record: dict[str, Any] = {
        "unit": "million tokens per second, one core",
        "batch_windows": BATCH,
        "rounds": ROUNDS,
        "seconds_a_turn": SECONDS,
        "not_installed": sorted(set(missing)),
        "environment": environment(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        program = _compile(folder)
        for stream in STREAMS:
            for length in LENGTHS:
                record["rows"] += _measure_one(stream, length, program, set(missing))
                write_record(RECORD, record)
    return record


def _measure_one(stream: str, length: int, program: str | None, missing: set[str]) -> list[dict]:
    engines: dict[str, EngineProcess] = {}
    for name, preset, dtype, batch, isa in OURS:
        # The second stream and the longer window answer for the presets only.
        if (stream, length) == ("zipf", 256) or (batch > 1 and not isa):
            arguments = (preset, dtype, batch, isa, stream, length)
            engines[name] = EngineProcess(Ours, *arguments, name=name)
    for name, (make, _) in PEERS.items():
        if name not in missing and stream == "zipf":
            engines[name] = EngineProcess(make, stream, length, name=name)
    if program is not None and stream == "uniform" and length == 256:
        for preset in PRESETS:
            name = f"limit {preset}"
            engines[name] = EngineProcess(Limit, program, preset, name=name)
    turns: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            turns[name].append(engine.run()[0] / 1e6)
    for engine in engines.values():
        engine.stop()
    rows = []
    for name, values in turns.items():
        print(f"{stream} {length} {name}: {max(values):.4g}", file=sys.stderr)
        rows.append(
            {
                "engine": name,
                "stream": stream,
                "length": length,
                "best": max(values),
                "median": statistics.median(values),
                "turns": values,
            }
        )
    return rows


def _compile(folder: str) -> str | None:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return None
    source = Path(__file__).parent / "native" / "gather_limit.cpp"
    program = f"{folder}/gather_limit"
    subprocess.run([compiler, "-O3", "-march=native", "-o", program, str(source)], check=True)
    return program


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    from metagrad_filter.kernels.scorer import available_isas

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "instruction_sets": available_isas(),
        "python": platform.python_version(),
        "packages": versions(
            ("numpy", "jax", "scikit-learn", "fasttext-predict", "data-selection")
        ),
    }


def train_fasttext(path: str) -> None:
    """Trains DCLM's kind of model on random windows: speed does not depend on what it learned."""
    import fasttext

    strings = strings_of(windows_of("zipf", 256, 2000))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"__label__{i % 2} {text}\n" for i, text in enumerate(strings))
        file.flush()
        model = fasttext.train_supervised(
            file.name, dim=256, wordNgrams=2, minCount=3, lr=0.1, epoch=1, thread=2, verbose=0
        )
    model.save_model(path)


def lookup(record: dict[str, Any], engine: str, stream: str = "zipf", length: int = 256) -> float:
    """Returns an engine's best figure in million tokens a second; raises `KeyError`."""
    for row in record["rows"]:
        if (row["engine"], row["stream"], row["length"]) == (engine, stream, length):
            return row["best"]
    raise KeyError((engine, stream, length))


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    columns = [("zipf", 256), ("zipf", 1024), ("uniform", 256), ("uniform", 1024)]
    names = list(dict.fromkeys(row["engine"] for row in record["rows"]))
    fast = "fastText, 256 dimensions (DCLM)"
    lines = [
        "| million tokens/s, one core | Zipf, 256 | 1,024 | uniform, 256 | 1,024 | x fastText |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        cells = []
        for stream, length in columns:
            try:
                cells.append(f"{lookup(record, name, stream, length):.3g}")
            except KeyError:
                cells.append("")
        try:
            ratio = f"{lookup(record, name) / lookup(record, fast):.3g}"
        except KeyError:
            ratio = ""
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--train-fasttext"]:
        train_fasttext(sys.argv[2])
        return
    record = json.loads(RECORD.read_text()) if "--table" in sys.argv else measure()
    README.write_text(replaced(README.read_text(), "throughput-table", table(record)))
    print(table(record))


if __name__ == "__main__":
    main()
