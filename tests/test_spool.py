"""What the filter spools for calibration: the sample, its files, their bounds, what goes wrong."""

import errno
import gc
import multiprocessing as mp
import os
import pickle
import time
import warnings

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import metagrad_filter as mgf
from metagrad_filter.calibration.source import WindowSource
from metagrad_filter.errors import ConfigError, WindowError
from metagrad_filter.spool import Spool, SpooledWindows
from metagrad_filter.store import LocalStore
from metagrad_filter.windows import SeriesWindows, TextWindows

LENGTH = 6


def block_of(block, n=100, length=LENGTH):
    """Windows that say where they come from."""
    windows = np.zeros((n, length), np.int32)
    windows[:, 0], windows[:, 1] = block, np.arange(n)
    return windows


def names(run_dir, name="default"):
    folder = run_dir / "spool" / name
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_what_is_read_back_is_what_was_sampled(tmp_path):
    spool = Spool(tmp_path, "train", share=0.1, seed=3)
    expected = []
    for block in range(40):
        chosen = spool.positions(block, 100)
        probability = np.linspace(0, 1, 100, dtype=np.float32)
        count = spool.offer(
            block, block_of(block), keep_probability=probability, kept=np.arange(0, 100, 2)
        )
        assert count == len(chosen)
        expected += [(block, int(i)) for i in chosen]
    assert names(tmp_path, "train") == []  # buffered so far
    spool.flush()
    found = SpooledWindows(tmp_path, "train")
    assert len(found) == len(expected) == spool.counters.windows
    assert list(zip(found.blocks.tolist(), found.positions.tolist())) == expected
    windows = found.take(np.arange(len(found)))
    assert windows.dtype == np.int32 and windows.shape == (len(found), LENGTH)
    np.testing.assert_array_equal(windows[:, :2], expected)
    np.testing.assert_allclose(found.keep_probability, found.positions / 99, rtol=1e-6)
    np.testing.assert_array_equal(found.kept, found.positions % 2 == 0)


@given(st.lists(st.none() | st.text(max_size=80), min_size=1, max_size=6))
def test_names_of_sources_come_back(tmp_path_factory, given_names):
    run_dir = tmp_path_factory.mktemp("run")
    spool = Spool(run_dir, share=1.0)
    for block, name in enumerate(given_names):
        spool.offer(block, block_of(block, 3), sources=None if name is None else [name] * 3)
    spool.flush()
    found = SpooledWindows(run_dir)
    for block, name in enumerate(given_names):
        whole = (name or "").encode(errors="replace")[:64].rstrip(b"\0").decode(errors="ignore")
        assert found.sources[found.blocks == block].tolist() == [whole] * 3
    known = WindowSource(found).sources(np.arange(len(found)))
    if any(found.sources != ""):
        assert known is not None and known.tolist() == [name or "unknown" for name in found.sources]
    else:
        assert known is None


def test_a_filter_that_knows_sources_spools_them(tmp_path):
    elements = [{"tokens": w, "from": f"site {i % 3}"} for i, w in enumerate(block_of(0, 400))]
    ds = mgf.score_filter(
        grain.MapDataset.source(elements),
        tmp_path,
        keep_ratio=0.5,
        windows=TextWindows("tokens"),
        block_windows=50,
        source_key="from",
        spool_share=0.5,
    )
    assert len(list(ds)) == 200
    del ds
    gc.collect()
    found = SpooledWindows(tmp_path)
    assert len(found) > 100
    numbers = found.take(np.arange(len(found)))[:, 1]
    assert found.sources.tolist() == [f"site {number % 3}" for number in numbers]


@given(st.integers(0, 2**40), st.integers(0, 600), st.integers(0, 2**31))
def test_the_draw_is_a_function_of_seed_name_and_block(block, n, seed):
    found = [Spool("nowhere", "a", seed=seed).positions(block, n) for _ in range(2)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (np.diff(found[0]) > 0).all() and (not n or found[0].max(initial=-1) < n)


def test_every_window_is_sampled_equally_often_and_seeds_differ():
    spool = Spool("nowhere", share=0.02)
    draws = [spool.positions(block, 512) for block in range(4000)]
    total = sum(map(len, draws))
    expected = 4000 * 512 * 0.02
    assert abs(total - expected) < 5 * expected**0.5
    times = np.bincount(np.concatenate(draws), minlength=512)
    assert abs(times - 80).max() < 6 * 80**0.5
    other = Spool("nowhere", share=0.02, seed=1)
    assert any(not np.array_equal(other.positions(b, 512), draws[b]) for b in range(5))


def test_series_are_spooled_as_they_are_missing_values_too(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 4, 2)).astype(np.float32)
    values[3, 1, 0] = np.nan
    spool = Spool(tmp_path, share=1.0)
    spool.offer_elements(0, [{"v": v} for v in values], SeriesWindows("v"))
    spool.flush()
    found = SpooledWindows(tmp_path)
    np.testing.assert_array_equal(found.take(np.arange(50)), values)
    assert np.isnan(found.keep_probability).all() and (found.kept == -1).all()


def test_elements_that_are_no_windows_are_left_out_and_counted(tmp_path):
    elements: list[dict] = [{"tokens": w} for w in block_of(0, 20)]
    elements[4] = {"tokens": np.zeros(3, np.int32)}
    elements[7] = {"words": "none"}
    spool = Spool(tmp_path, share=1.0)
    assert spool.offer_elements(0, elements, TextWindows("tokens")) == 18
    spool.flush()
    found = SpooledWindows(tmp_path)
    assert sorted(found.positions.tolist()) == [i for i in range(20) if i not in (4, 7)]
    assert spool.counters.unreadable == 2


def test_a_spool_that_grows_too_fast_stays_bounded_and_keeps_the_newest(tmp_path):
    limit = 20_000
    spool = Spool(tmp_path, share=1.0, limit_bytes=limit)
    for block in range(60):
        spool.offer(block, block_of(block))
        spool.flush()
        held = sum(path.stat().st_size for path in (tmp_path / "spool/default").iterdir())
        assert held <= limit
    found = SpooledWindows(tmp_path)
    newest = sorted(set(found.blocks.tolist()))
    assert newest == list(range(60 - len(newest), 60)) and len(newest) >= 2
    assert spool.counters.removed_files == 60 - len(newest)


def test_the_newest_file_stays_though_it_alone_is_over_the_limit(tmp_path):
    spool = Spool(tmp_path, share=1.0, limit_bytes=1)
    for block in range(3):
        spool.offer(block, block_of(block))
        spool.flush()
    assert len(names(tmp_path)) == 1
    assert set(SpooledWindows(tmp_path).blocks.tolist()) == {2}


def test_a_full_buffer_is_written_without_being_asked(tmp_path):
    spool = Spool(tmp_path, share=1.0, file_bytes=1000)
    spool.offer(0, block_of(0))
    writer = spool._writer
    assert writer is not None
    writer.join()
    assert len(names(tmp_path)) == 1


def test_an_old_buffer_is_written_though_it_is_not_full(tmp_path):
    now = [0.0]
    spool = Spool(tmp_path, share=1.0, clock=lambda: now[0])
    spool.offer(0, block_of(0, 3))
    now[0] = 61.0
    assert spool._writer is None
    spool.offer(1, block_of(1, 3))
    assert spool._writer is not None
    spool.flush()
    assert len(SpooledWindows(tmp_path)) == 6


def test_a_block_that_is_read_again_after_a_resume_counts_once(tmp_path):
    for _ in range(2):
        spool = Spool(tmp_path, share=0.3)
        spool.offer(5, block_of(5))
        spool.flush()
    found = SpooledWindows(tmp_path)
    assert len(names(tmp_path)) == 2
    assert len(set(found.positions.tolist())) == len(found) == spool.counters.windows
    # Another host's block of the same number holds other windows.
    spool.offer(5, block_of(5) + 1)
    spool.flush()
    assert found.refresh() == 2 * len(set(found.positions.tolist()))


def test_the_same_window_draws_the_same_lot_in_every_snapshot(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    spool.offer(0, block_of(0))
    spool.flush()
    found = SpooledWindows(tmp_path)
    before = {tuple(w): lot for w, lot in zip(found.take(np.arange(100)).tolist(), found.lots)}
    assert 0.2 < np.mean(found.lots < 1 / 3) < 0.5
    spool.offer(1, np.concatenate([block_of(1), block_of(0)]))
    spool.flush()
    found.refresh()
    windows = found.take(np.arange(len(found))).tolist()
    again = [(before[tuple(w)], lot) for w, lot in zip(windows, found.lots) if tuple(w) in before]
    assert len(again) == 200 and all(a == b for a, b in again)


# What goes wrong.


def test_the_newest_windows_are_those_of_the_highest_blocks(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    for block in (3, 0, 2, 1):
        spool.offer(block, block_of(block, n=10))
    spool.flush()
    found = SpooledWindows(tmp_path, newest=25)
    assert len(found) == len(found.lots) == 25
    counts = np.bincount(found.blocks, minlength=4)
    assert counts.tolist() == [0, 5, 10, 10]
    np.testing.assert_array_equal(found.take(np.arange(25))[:, 0], found.blocks)
    assert len(pickle.loads(pickle.dumps(found))) == 25
    assert len(SpooledWindows(tmp_path, newest=100)) == 40
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match=r"newest=.*windows >= 1"):
            SpooledWindows(tmp_path, newest=wrong)  # pyright: ignore[reportArgumentType]


def test_a_disk_that_fails_pauses_sampling_with_one_warning(tmp_path, monkeypatch):
    now = [0.0]
    spool = Spool(tmp_path, share=1.0, clock=lambda: now[0])

    def full(self, key, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write_once", full)
        spool.offer(0, block_of(0))
        with pytest.warns(RuntimeWarning, match="No space left.*filter goes on"):
            spool.flush()
        assert spool.offer(1, block_of(1)) == 0  # paused
        now[0] = 61.0
        assert spool.offer(2, block_of(2)) == 100
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spool.flush()
    assert spool.counters.failures == 2 and spool.counters.lost_windows == 200
    now[0] = 122.0
    spool.offer(3, block_of(3))
    spool.flush()
    assert set(SpooledWindows(tmp_path).blocks.tolist()) == {3}


def test_a_run_directory_that_is_a_file_does_not_reach_the_loader(tmp_path):
    (tmp_path / "run").write_text("")
    spool = Spool(tmp_path / "run", share=1.0)
    spool.offer(0, block_of(0))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        spool.flush()
    assert spool.counters.failures == 1


def test_writing_that_falls_behind_loses_windows_and_not_memory(tmp_path, monkeypatch):
    slow = LocalStore.write_once

    def wait(self, key, data):
        time.sleep(0.3)
        return slow(self, key, data)

    monkeypatch.setattr(LocalStore, "write_once", wait)
    spool = Spool(tmp_path, share=1.0, file_bytes=2400)  # one block
    for block in range(50):
        spool.offer(block, block_of(block))
        assert spool._bytes <= 4 * 2400 + 2400
    spool.flush()
    counters = spool.counters
    assert counters.lost_windows > 0
    assert counters.windows + counters.lost_windows == 5000
    assert len(SpooledWindows(tmp_path)) == counters.windows


@given(st.data())
def test_damaged_files_are_skipped_with_one_warning(tmp_path_factory, data):
    run_dir = tmp_path_factory.mktemp("run")
    spool = Spool(run_dir, share=1.0)
    for block in range(3):
        spool.offer(block, block_of(block, 10))
        spool.flush()
    path = run_dir / "spool/default" / names(run_dir)[1]
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="Skipping") as caught:
        found = SpooledWindows(run_dir)
    assert len(caught) == 1 and found.skipped_files == 1
    assert set(found.blocks.tolist()) == {0, 2} and found.refresh() == 20


def test_files_that_are_none_of_the_spool_are_ignored(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    spool.offer(0, block_of(0))
    spool.flush()
    folder = tmp_path / "spool/default"
    (folder / ".tmp-1-00").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    assert len(SpooledWindows(tmp_path)) == 100


def test_an_empty_spool_is_empty(tmp_path):
    found = SpooledWindows(tmp_path, "train")
    assert len(found) == 0 and found.refresh() == 0


def test_windows_of_another_length_begin_a_new_file_and_the_newest_length_counts(tmp_path):
    spool = Spool(tmp_path, share=1.0)
    spool.offer(0, block_of(0))
    spool.offer(1, block_of(1, length=9))
    spool.flush()
    found = SpooledWindows(tmp_path)
    assert found.take(np.arange(3)).shape == (3, 9) and len(found) == 100


def test_a_snapshot_stays_as_it_was_until_it_is_refreshed(tmp_path):
    spool = Spool(tmp_path, share=1.0, limit_bytes=4000)
    spool.offer(0, block_of(0))
    spool.flush()
    found = SpooledWindows(tmp_path)
    spool.offer(1, block_of(1))
    spool.flush()
    np.testing.assert_array_equal(found.take(np.arange(100)), block_of(0))
    found.refresh()
    np.testing.assert_array_equal(found.take(np.arange(100)), block_of(1))


def _write(spool, first):
    for block in range(first, first + 20):
        spool.offer(block, block_of(block))
    # Nothing is flushed: the end of the process does it.


def _write_in_children(run_dir, method):
    spool = Spool(run_dir, share=0.5)
    spool.offer(1000, block_of(1000))
    context = mp.get_context(method)
    children = [context.Process(target=_write, args=(spool, 100 * i)) for i in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    # The parent's buffer is written at its end.


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_write_at_once_and_a_child_leaves_its_parents_buffer_alone(tmp_path, method):
    # Not a fork of this process, which may hold JAX's threads.
    process = mp.get_context("spawn").Process(target=_write_in_children, args=(tmp_path, method))
    process.start()
    process.join()
    assert process.exitcode == 0
    found, spool = SpooledWindows(tmp_path), Spool(tmp_path, share=0.5)
    expected = {1000, *range(20), *range(100, 120)}
    assert set(found.blocks.tolist()) == expected
    assert len(found) == sum(len(spool.positions(block, 100)) for block in expected)
    assert len(names(tmp_path)) == 3


def test_both_ends_travel_to_other_processes(tmp_path):
    spool = Spool(tmp_path, "a", share=0.5, seed=4)
    spool.offer(0, block_of(0))
    copy = pickle.loads(pickle.dumps(spool))
    np.testing.assert_array_equal(copy.positions(7, 100), spool.positions(7, 100))
    copy.flush()
    assert names(tmp_path, "a") == []  # the buffer stayed where it was
    spool.flush()
    data = pickle.dumps(SpooledWindows(tmp_path, "a"))
    assert len(data) < 500
    assert len(pickle.loads(data)) == spool.counters.windows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0}, "share=0; expected a number in"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": True}, "share=True"),
        ({"limit_bytes": 0}, "limit_bytes=0; expected an integer >= 1"),
        ({"seed": -1}, "seed=-1"),
        ({"name": "../up"}, "../up"),
        ({"name": "a/b"}, "one file name"),
    ],
)
def test_arguments_out_of_their_domain_are_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Spool(tmp_path, **arguments)


@pytest.mark.parametrize(
    "windows", [np.zeros((3, 4)), np.zeros((3, 4, 2), np.int32), np.zeros(5, np.int32)]
)
def test_what_is_no_block_of_windows_is_refused(tmp_path, windows):
    with pytest.raises(WindowError, match=r"expected \(n, T\) integers"):
        Spool(tmp_path, share=1.0).offer(0, windows)
