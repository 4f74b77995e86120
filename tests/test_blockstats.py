"""Block statistics: what is recorded is what happened, and nothing of it reaches the loader."""

import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagrad_filter import blockstats
from metagrad_filter.blockstats import BlockStatistics, bin_edges, merge, read_records
from metagrad_filter.errors import ConfigError

REFERENCE = np.quantile(np.random.default_rng(0).normal(size=4096), np.linspace(0, 1, 257)).tolist()
SCORER = SimpleNamespace(metadata={"reference": REFERENCE})


def blocks(n: int, windows: int = 32, seed: int = 0):
    rng = np.random.default_rng(seed)
    for block in range(n):
        scores = rng.normal(size=windows).astype(np.float32)
        yield block, scores, np.sort(np.argsort(scores)[-windows // 4 :])


def write(statistics: BlockStatistics, n: int, *, version: int = 1, seed: int = 0, first: int = 0):
    for block, scores, kept in blocks(n, seed=seed):
        statistics.block(
            block=first + block,
            version=version,
            scorer=SCORER,
            scores=scores,
            kept=kept,
            groups={"source": ["web" if s > 0 else "code" for s in scores]},
            features={"loss": float(scores.mean()), "absent": None},
            seconds=0.5,
        )


def test_a_record_says_what_the_blocks_were(tmp_path):
    statistics = BlockStatistics(tmp_path, "t", every_blocks=4)
    write(statistics, 4, first=10)
    (record,) = read_records(tmp_path, "t")
    scores = np.stack([s for _, s, _ in blocks(4)]).astype(np.float64)
    chosen = [s[k] for _, s, k in blocks(4)]
    assert (record["format"], record["name"], record["version"]) == (1, "t", 1)
    assert (record["first_block"], record["last_block"], record["blocks"]) == (10, 13, 4)
    assert (record["windows"], record["kept"], record["uniform_blocks"]) == (128, 32, 0)
    assert record["seconds"] == 2.0
    assert record["scores"]["count"] == 128
    assert record["scores"]["mean"] == pytest.approx(scores.mean())
    assert record["scores"]["m2"] == pytest.approx(((scores - scores.mean()) ** 2).sum())
    assert record["scores"]["maximum"] == scores.max()
    # The histogram, by numpy's own: edges belong to the upper bin in both.
    edges = [-np.inf, *np.quantile(REFERENCE, np.arange(1, 64) / 64).astype(np.float32), np.inf]
    assert record["scores"]["bins"] == np.histogram(scores, edges)[0].tolist()
    assert record["scores"]["kept_bins"] == np.histogram(chosen, edges)[0].tolist()
    lowest = [c.min() for c in chosen]
    assert record["threshold"]["mean"] == pytest.approx(np.mean(lowest))
    assert record["threshold"]["minimum"] == min(lowest)
    web = [int((scores > 0).sum()), int((np.stack(chosen) > 0).sum())]
    assert record["groups"]["source"]["web"] == web
    assert sum(seen for seen, _ in record["groups"]["source"].values()) == 128
    assert record["features"]["loss"]["mean"] == pytest.approx(scores.mean())
    assert set(record["features"]) == {"loss"}


def test_a_score_on_an_edge_belongs_to_the_upper_bin(tmp_path):
    scorer = SimpleNamespace(metadata={"reference": list(range(257))})
    statistics = BlockStatistics(tmp_path)
    scores = np.array([3.5, 4, 252, 256], np.float32)
    statistics.block(block=0, version=1, scorer=scorer, scores=scores, kept=np.array([1]))
    statistics.flush()
    found = read_records(tmp_path)[0]["scores"]
    assert [found["bins"][i] for i in (0, 1, 63)] == [1, 1, 2] and found["kept_bins"][1] == 1


def test_a_new_version_or_a_flush_ends_a_record(tmp_path):
    statistics = BlockStatistics(tmp_path, every_blocks=8)
    write(statistics, 3, version=1)
    write(statistics, 9, version=2, first=3)
    assert [(r["version"], r["blocks"]) for r in read_records(tmp_path)] == [(1, 3), (2, 8)]
    statistics.flush()
    statistics.flush()
    records = read_records(tmp_path)
    assert [(r["version"], r["blocks"], r["sequence"]) for r in records] == [
        (1, 3, 0),
        (2, 8, 1),
        (2, 1, 2),
    ]


def test_uniform_blocks_and_versions_without_reference_have_no_bins(tmp_path):
    statistics = BlockStatistics(tmp_path)
    statistics.block(block=0, version=0, kept=np.arange(3), windows=12)
    statistics.block(block=1, version=-1, kept=np.arange(12))
    plain = SimpleNamespace(metadata={"reference": [1.0, math.nan]})
    statistics.block(block=2, version=4, scorer=plain, scores=np.ones(5), kept=np.array([], int))
    statistics.flush()
    uniform, unasked, bare = read_records(tmp_path)
    assert (uniform["uniform_blocks"], uniform["windows"], uniform["kept"]) == (1, 12, 3)
    assert uniform["scores"] is None and uniform["threshold"] is None
    assert (unasked["uniform_blocks"], unasked["windows"]) == (0, 12)
    assert bare["scores"]["bins"] is None and bare["scores"]["kept_bins"] is None
    assert bare["scores"]["count"] == 5 and bare["threshold"] is None


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.data())
def test_non_finite_scores_are_left_out_and_every_record_is_json(tmp_path_factory, values, data):
    tmp_path = tmp_path_factory.mktemp("run")
    scores = np.array(values, np.float32)
    kept = data.draw(st.lists(st.integers(0, len(values) - 1), unique=True))
    with BlockStatisticsUnwarned(tmp_path) as statistics:
        statistics.block(block=0, version=1, scorer=SCORER, scores=scores, kept=np.array(kept))
    (record,) = read_records(tmp_path)
    finite = scores[np.isfinite(scores)]
    assert record["windows"] == len(values) and record["kept"] == len(kept)
    if not len(finite):
        assert record["scores"] is None
        return
    assert record["scores"]["count"] == len(finite) == sum(record["scores"]["bins"])
    assert sum(record["scores"]["kept_bins"]) == np.isfinite(scores[kept]).sum()


class BlockStatisticsUnwarned:
    """Fails on any warning, since one would say that a block or record was lost."""

    def __init__(self, run_dir):
        self.statistics = BlockStatistics(run_dir)

    def __enter__(self):
        return self.statistics

    def __exit__(self, *_):
        self.statistics.flush()
        assert (self.statistics.lost_blocks, self.statistics.lost_records) == (0, 0)


def test_labels_beyond_32_are_other_and_keep_their_sum(tmp_path):
    statistics = BlockStatistics(tmp_path)
    for block in range(3):
        labels = [f"{block}-{i}" for i in range(30)]
        statistics.block(block=block, version=0, kept=np.arange(7), groups={"source": labels})
    statistics.flush()
    table = read_records(tmp_path)[0]["groups"]["source"]
    assert len(table) == 33 and table["other"][0] == 90 - 32
    assert np.sum(list(table.values()), axis=0).tolist() == [90, 21]


def test_a_block_that_cannot_be_summed_is_counted_and_does_not_raise(tmp_path):
    statistics = BlockStatistics(tmp_path, "bad")
    write(statistics, 1)
    with pytest.warns(RuntimeWarning, match="2 labels for 3 windows"):
        statistics.block(
            block=1, version=1, scores=np.zeros(3), kept=np.zeros(0), groups={"source": ["a", "b"]}
        )
    statistics.block(block=2, version=1, scores=np.zeros(3), kept=np.array([9]))
    assert statistics.lost_blocks == 2
    write(statistics, 1, first=3)
    statistics.flush()
    assert read_records(tmp_path)[0]["blocks"] == 2


def test_a_directory_that_cannot_be_written_loses_records_and_says_so_once(tmp_path):
    (tmp_path / "metrics").write_text("a file where a directory should be")
    statistics = BlockStatistics(tmp_path, "full", every_blocks=1)
    with pytest.warns(RuntimeWarning, match="Statistics cannot be written") as seen:
        write(statistics, 5)
    assert len(seen) == 1
    assert statistics.lost_records == 5 and statistics.lost_blocks == 0
    (tmp_path / "metrics").unlink()
    write(statistics, 2, first=5)
    assert [r["first_block"] for r in read_records(tmp_path)] == [5, 6]


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are set the POSIX way")
def test_a_full_disk_loses_records_and_training_goes_on(tmp_path):
    program = f"""
import resource, signal, warnings, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import numpy as np
from metagrad_filter.blockstats import BlockStatistics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
warnings.simplefilter("ignore")
s = BlockStatistics({str(tmp_path)!r}, "t", every_blocks=1)
for block in range(4):
    s.block(block=block, version=1, scores=np.arange(4.0), kept=np.array([1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
s.block(block=4, version=1, scores=np.arange(4.0), kept=np.array([1]))
print(s.lost_records)
"""
    lost = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert int(lost) == 3
    records = read_records(tmp_path, "t")
    # The first line fits, the second is torn, the last one is whole again behind it.
    assert [r["first_block"] for r in records] == [0, 4]
    assert records.damaged == 1


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    statistics = BlockStatistics(tmp_path, "t", every_blocks=1)
    write(statistics, 3)
    (path,) = (tmp_path / "metrics" / "t").iterdir()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(0, len(lines[2]) - 1, 7):
        path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        records = read_records(tmp_path, "t")
        assert len(records) == 2 and records.damaged == (cut > 0)
    wrong = json.loads(lines[1])
    wrong["scores"]["bins"] = wrong["scores"]["bins"][:-1]
    for bad in (b"[]", b"nonsense", b"\xff", json.dumps(wrong).encode(), b'{"format": 2}'):
        path.write_bytes(lines[0] + bad + b"\n" + lines[2])
        records = read_records(tmp_path, "t")
        assert [r["sequence"] for r in records] == [0, 2] and records.damaged == 1


def test_files_rotate_and_records_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(blockstats, "_MAX_FILE_BYTES", 3000)
    statistics = BlockStatistics(tmp_path, "t", every_blocks=1)
    write(statistics, 20)
    files = sorted((tmp_path / "metrics" / "t").iterdir())
    assert len(files) > 3 and all(f.stat().st_size <= 3000 for f in files)
    assert [r["sequence"] for r in read_records(tmp_path, "t")] == list(range(20))


def test_a_store_that_is_no_directory_gets_one_object_a_record():
    url = "memory://blockstats"
    statistics = BlockStatistics(url, "t", every_blocks=2)
    write(statistics, 5)
    statistics.flush()
    assert [r["blocks"] for r in read_records(url)] == [2, 2, 1]
    assert statistics.lost_records == 0


def test_threads_lose_nothing(tmp_path):
    statistics = BlockStatistics(tmp_path, "t", every_blocks=3)
    threads = [
        threading.Thread(target=write, args=(statistics, 25), kwargs={"first": 25 * i})
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statistics.flush()
    records = read_records(tmp_path, "t")
    assert sum(r["blocks"] for r in records) == 100
    assert [r["sequence"] for r in records] == list(range(len(records)))


def _child(statistics: BlockStatistics) -> None:
    write(statistics, 3, first=100)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_write_sessions_of_their_own_also_what_is_left_at_their_end(tmp_path, method):
    statistics = BlockStatistics(tmp_path, "t")
    write(statistics, 2)
    with warnings.catch_warnings():
        # Forking beside the threads of jax is what this test is about, not what it warns of.
        warnings.simplefilter("ignore")
        process = multiprocessing.get_context(method).Process(target=_child, args=(statistics,))
        process.start()
    process.join(60)
    assert process.exitcode == 0
    statistics.flush()
    found = {r["session"]: (r["first_block"], r["blocks"]) for r in read_records(tmp_path, "t")}
    assert sorted(found.values()) == [(0, 2), (100, 3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_while_a_thread_records_does_not_wait_for_that_thread(tmp_path):
    statistics = BlockStatistics(tmp_path, "t")
    with statistics._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = multiprocessing.get_context("fork").Process(target=_child, args=(statistics,))
        process.start()
        process.join(30)
    process.kill()
    assert process.exitcode == 0
    assert [r["first_block"] for r in read_records(tmp_path, "t")] == [100]


def test_what_is_left_is_written_at_exit_and_when_the_object_goes(tmp_path):
    program = f"""
import numpy as np
from metagrad_filter.blockstats import BlockStatistics
kept = BlockStatistics({str(tmp_path)!r}, "t")
kept.block(block=1, version=1, scores=np.arange(4.0), kept=np.array([1]))
gone = BlockStatistics({str(tmp_path)!r}, "t")
gone.block(block=2, version=1, scores=np.arange(4.0), kept=np.array([1]))
del gone
import sys
assert not {{"jax", "flax", "optax", "prometheus_client", "tensorstore"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert sorted(r["first_block"] for r in read_records(tmp_path, "t")) == [1, 2]


def test_pickling_carries_the_place_and_not_the_blocks(tmp_path):
    statistics = BlockStatistics(tmp_path, "t", every_blocks=5)
    write(statistics, 2)
    copy = pickle.loads(pickle.dumps(statistics))
    assert (copy.run_dir, copy.name, copy.every_blocks) == (str(tmp_path), "t", 5)
    copy.flush()
    assert read_records(tmp_path) == []


def test_merging_records_is_recording_once(tmp_path):
    apart = BlockStatistics(tmp_path, "apart", every_blocks=3)
    whole = BlockStatistics(tmp_path, "whole", every_blocks=10)
    for statistics in (apart, whole):
        write(statistics, 10)
        statistics.flush()
    (expected,) = read_records(tmp_path, "whole")
    merged = merge(read_records(tmp_path, "apart"))
    for field in ("blocks", "windows", "kept", "first_block", "last_block", "seconds", "groups"):
        assert merged[field] == expected[field], field
    assert merged["scores"]["bins"] == expected["scores"]["bins"]
    for part in ("scores", "threshold"):
        for field in set(expected[part]) - {"bins", "kept_bins"}:
            assert merged[part][field] == pytest.approx(expected[part][field]), field
    assert merged["features"]["loss"] == pytest.approx(expected["features"]["loss"])


def test_versions_are_not_merged(tmp_path):
    statistics = BlockStatistics(tmp_path, "t", every_blocks=1)
    write(statistics, 1, version=1)
    write(statistics, 1, version=2)
    with pytest.raises(ConfigError, match=r"\('t', 1\), \('t', 2\).*apart"):
        merge(read_records(tmp_path))
    with pytest.raises(ConfigError, match="nothing"):
        merge([])


@pytest.mark.parametrize("reference", [None, [], [1.0], [2.0, 1.0], [0.0, math.inf], "ab", [[1]]])
def test_unusable_references_make_no_bins(reference):
    assert bin_edges(reference) is None


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match="every_blocks is 0"):
        BlockStatistics(tmp_path, every_blocks=0)
    with pytest.raises(ConfigError, match=r"name is '\.\./x'"):
        BlockStatistics(tmp_path, "../x")
    with pytest.raises(ConfigError, match=r"name is '\.\./x'"):
        read_records(tmp_path, "../x")
