"""A WebDataset stage: exact counts per worker, typed errors, and a state through FilteredStream."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, StateMismatch, WindowError

wds: Any = pytest.importorskip("webdataset")
torch: Any = pytest.importorskip("torch")

KEY = "tokens.npy"
OPTIONS: dict[str, Any] = {
    "keep_ratio": 0.3,
    "windows": mgf.TextWindows(KEY),
    "block_windows": 10,
    "swap_every_blocks": 2,
}


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def write(directory, arrays, shards=1) -> list[str]:
    urls = []
    for shard in range(shards):
        path = directory / f"shard-{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(shard, len(arrays), shards):
                buffer = io.BytesIO()
                np.save(buffer, arrays[i])
                info = tarfile.TarInfo(f"{i:04d}.{KEY}")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
        urls.append(str(path))
    return urls


def tokens(n):
    return [element["tokens"] for element in make_elements(n)]


def pipeline(urls, **options):
    return wds.WebDataset(urls, shardshuffle=False, **options).decode()


def score_filter(run_dir, **options):
    return mgf.adapters.webdataset.score_filter(run_dir, **OPTIONS | options)


def indices(samples) -> list[int]:
    return [int(sample["__key__"].rpartition("/")[2]) for sample in samples]


def through_grain(arrays, run_dir):
    elements = [{KEY: array, "__key__": str(i)} for i, array in arrays]
    ds = grain.MapDataset.source(elements).to_iter_dataset()
    return list(mgf.score_filter(ds, run_dir, **OPTIONS))


def digest(samples) -> str:
    sha = hashlib.sha256()
    for sample, index in zip(samples, indices(samples)):
        sha.update(np.ascontiguousarray(sample[KEY]).tobytes())
        sha.update(index.to_bytes(8, "little"))
    return sha.hexdigest()


@pytest.mark.parametrize("scored", [False, True])
def test_the_stream_is_that_of_grains_filter(tmp_path, scored):
    if scored:
        publish(tmp_path)
    urls = write(tmp_path, tokens(95))
    expected = through_grain(list(enumerate(tokens(95))), tmp_path)
    composed = pipeline(urls).compose(score_filter(tmp_path))
    assert digest(list(composed)) == digest(expected)
    staged = wds.DataPipeline(
        wds.SimpleShardList(urls),
        wds.tarfile_to_samples(),
        wds.decode(),
        score_filter(tmp_path),
    )
    assert digest(list(staged)) == digest(expected)
    batched = pipeline(urls).compose(score_filter(tmp_path)).to_tuple(KEY).batched(7)
    assert [len(batch[0]) for batch in batched] == [7] * 4


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_each_worker_filters_its_own_shards(tmp_path, context):
    publish(tmp_path)
    arrays = list(enumerate(tokens(80)))
    urls = write(tmp_path, tokens(80), shards=2)
    ds = pipeline(urls, empty_check=False).compose(score_filter(tmp_path))
    got = indices(
        wds.WebLoader(ds, batch_size=None, num_workers=2, multiprocessing_context=context)
    )
    for worker in range(2):
        mine = [i for i in got if i % 2 == worker]
        assert mine == indices(through_grain(arrays[worker::2], tmp_path)) and len(mine) == 12
    # More workers than shards: the third has none and ends quietly.
    assert sorted(indices(wds.WebLoader(ds, batch_size=None, num_workers=3))) == sorted(got)


def test_a_state_is_had_through_a_filtered_stream(tmp_path):
    publish(tmp_path)
    urls = write(tmp_path, tokens(73), shards=2)

    def make():
        config = mgf.adapters.options.configure(tmp_path, **OPTIONS)
        source = lambda: iter(pipeline(urls).shuffle(20, seed=5))  # noqa: E731
        return mgf.adapters.stream.FilteredStream(source, config)

    kept = make()
    states, expected = [kept.state_dict()], []
    for sample in kept:
        expected.append(sample)
        states.append(kept.state_dict())
    assert len(expected) == 21
    for step, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert indices(list(resumed)) == indices(expected[step:])


def test_the_threshold_rule_reads_nothing_ahead(tmp_path):
    seen = []
    urls = write(tmp_path, tokens(60))
    ds = pipeline(urls).map(lambda sample: seen.append(1) or sample)
    kept = iter(ds.compose(score_filter(tmp_path, rule="threshold", keep_ratio=0.5)))
    for n in range(1, 10):
        next(kept)
        assert n <= len(seen) < 60


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([1, VOCAB] * 8, np.int32), "id 100"),
        (np.zeros(15, np.int32), "equal lengths"),
        (np.zeros(0, np.int32), "empty"),
        (np.zeros(16), "integer"),
    ],
)
def test_unreadable_windows_end_typed(tmp_path, bad, message):
    publish(tmp_path)
    arrays = tokens(12)
    arrays[3] = bad
    with pytest.raises(WindowError, match=message):
        list(pipeline(write(tmp_path, arrays)).compose(score_filter(tmp_path)))


def test_wrong_places_and_options_say_what_to_do(tmp_path):
    publish(tmp_path)
    urls = write(tmp_path, tokens(20))
    with pytest.raises(WindowError, match="no key 'text', available"):
        list(pipeline(urls).compose(score_filter(tmp_path, windows=mgf.TextWindows("text"))))
    other = score_filter(tmp_path, name="tuples")
    with pytest.raises(WindowError, match="expected a dict"):
        list(pipeline(urls).to_tuple(KEY).compose(other))
    with pytest.raises(StateMismatch, match="keep_ratio"):
        score_filter(tmp_path, name="tuples", keep_ratio=0.5)
    with pytest.raises(ConfigError, match="keep_ratio is 2"):
        score_filter(tmp_path, keep_ratio=2)
    empty = write(tmp_path, [])
    with pytest.raises(WindowError, match="before its first element"):
        list(pipeline(empty, empty_check=False).compose(other))
