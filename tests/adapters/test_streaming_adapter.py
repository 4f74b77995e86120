"""MosaicML Streaming: one kept stream for any number of workers, exact resume, equal ranks."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hotlane import VOCAB, make_elements, make_scorer

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError, StateMismatch, WindowError

torch: Any = pytest.importorskip("torch")


def without_compiled_operators() -> Any:
    """Declares what torchvision's compiled part would, so that a build for CUDA imports on a CPU.

    Streaming imports torchvision for image datasets, which nothing here uses.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


try:
    import torchvision  # noqa: F401  # pyright: ignore
except RuntimeError:
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[loaded]
    LIBRARY = without_compiled_operators()
except ModuleNotFoundError:
    pass
streaming: Any = pytest.importorskip("streaming")

OPTIONS: dict[str, Any] = {
    "keep_ratio": 0.3,
    "windows": mgf.TextWindows("tokens"),
    "block_windows": 12,
    "swap_every_blocks": 2,
}
N = 100


def publish(run_dir, seed=1, **fields) -> int:
    return mgf.Registry(run_dir).publish(make_scorer(seed, **fields))


def write(directory, elements=None) -> str:
    columns = {"tokens": "ndarray", "index": "int"}
    with streaming.MDSWriter(out=str(directory), columns=columns, size_limit=2048) as out:
        for element in elements if elements is not None else make_elements(N):
            out.write(element)
    return str(directory)


@pytest.fixture(scope="module")
def mds(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("mds") / "data")


def make_loader(mds, *, workers=0, batch_size=4, shuffle=True, **options):
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=mds, batch_size=batch_size, shuffle=shuffle, num_canonical_nodes=2
    )
    return streaming.StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=workers, **options
    )


def score_filter(loader, run_dir, **options):
    return mgf.adapters.streaming.score_filter(loader, run_dir, **OPTIONS | options)


def flat(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch["index"]]


def digest(elements) -> str:
    sha = hashlib.sha256()
    for element in elements:
        sha.update(np.ascontiguousarray(element["tokens"]).tobytes())
        sha.update(int(element["index"]).to_bytes(8, "little"))
    return sha.hexdigest()


def test_the_stream_is_that_of_grains_filter_for_any_number_of_workers(mds, tmp_path):
    publish(tmp_path)
    elements = make_elements(N)
    order = flat(make_loader(mds))
    ds = grain.MapDataset.source([elements[i] for i in order]).to_iter_dataset()
    expected = list(mgf.score_filter(ds, tmp_path, **OPTIONS))
    assert sorted(order) == list(range(N)) != order and len(expected) == 30
    for workers in (0, 1, 2):
        kept = score_filter(make_loader(mds, workers=workers), tmp_path)
        batches = list(kept)
        assert len(batches) == len(kept) == 8 and batches[0]["tokens"].shape == (4, 16)
        rows = [
            {"tokens": t.numpy(), "index": i}
            for b in batches
            for t, i in zip(b["tokens"], b["index"])
        ]
        assert digest(rows) == digest(expected)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0)])
def test_a_run_resumes_at_every_step_of_two_epochs(mds, tmp_path, before, after):
    for interval in (1, 3):
        mgf.Ledger(tmp_path).decide(interval, 0)
    publish(tmp_path)
    kept = score_filter(make_loader(mds, workers=before), tmp_path, annotate=True)
    states, batches = [kept.state_dict()], []
    for _ in range(2):
        for batch in kept:
            batches.append(batch)
            states.append(kept.state_dict())
    assert {int(v) for b in batches for v in b["scorer_version"]} == {0, 1}
    assert len(batches) == 16 and flat(batches[:8]) != flat(batches[8:])
    # Nine blocks an epoch, two an interval: the second epoch has intervals of its own.
    assert sorted(mgf.Ledger(tmp_path).entries()) == list(range(9))
    shape = {key: type(value) for key, value in states[0].items()}
    steps = range(len(states)) if (before, after) == (0, 0) else (0, 3, 7, 8, 11)
    for step in steps:
        text = json.dumps(states[step])
        assert len(text) < 1536 and {k: type(v) for k, v in states[step].items()} == shape
        resumed = score_filter(make_loader(mds, workers=after), tmp_path, annotate=True)
        resumed.load_state_dict(json.loads(text))
        assert resumed.state_dict() == states[step]
        rest = list(resumed)
        # A state at the end of an epoch has nothing left of it, or starts the next one.
        rest += list(resumed) if step <= 8 else []
        assert flat(rest) == flat(batches[step:]), step


def test_a_state_can_be_loaded_into_a_loader_in_use(mds, tmp_path):
    kept = score_filter(make_loader(mds), tmp_path)
    iterator = iter(kept)
    next(iterator)
    state = kept.state_dict()
    expected = flat(iterator)
    kept.load_state_dict(state)
    assert flat(kept) == expected


def test_collate_and_drop_last_are_the_loaders(mds, tmp_path):
    kept = score_filter(make_loader(mds, drop_last=True, collate_fn=len), tmp_path)
    assert list(kept) == [4] * 7 and len(kept) == 7


RANK = """
import json, os, sys
import test_streaming_adapter as t
rank = int(os.environ["RANK"])
t.streaming.base.util.clean_stale_shared_memory = lambda: None
mds, run_dir, workers, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
order = []
kept = t.score_filter(t.make_loader(mds, workers=workers), run_dir)
if resume:
    kept.load_state_dict(json.loads(resume[rank]))
out = {"batches": [], "states": []}
for batch in kept:
    out["batches"].append(t.flat([batch]))
    out["states"].append(kept.state_dict())
print("RESULT" + json.dumps(out))
"""


def run_ranks(mds, run_dir, workers, *resume):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        paths = [str(Path(__file__).parent), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {key: str(value) for key, value in {**world, **address}.items()}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, mds, str(run_dir), str(workers), *resume],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in ranks:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out[out.index("RESULT") + 6 :]))
    return results


def test_ranks_keep_equally_many_and_resume_together(mds, tmp_path):
    publish(tmp_path)
    first = run_ranks(mds, tmp_path, 1)
    kept = [[i for batch in rank["batches"] for i in batch] for rank in first]
    assert len(kept[0]) == len(kept[1]) == 15 and not set(kept[0]) & set(kept[1])
    assert [len(r["batches"]) for r in first] == [4, 4]
    again = run_ranks(mds, tmp_path, 0, *[json.dumps(r["states"][1]) for r in first])
    assert [r["batches"] for r in again] == [r["batches"][2:] for r in first]


# Bad input. (MDS refuses to write an empty array.)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([1, VOCAB] * 8, np.int32), "id 100"),
        (np.zeros(15, np.int32), "equal lengths"),
        (np.zeros(16, np.float32), "integer"),
    ],
)
def test_unreadable_windows_end_typed(tmp_path, bad, message, workers):
    publish(tmp_path)
    elements = make_elements(24)
    elements[3] = {"tokens": bad, "index": 3}
    loader = make_loader(write(tmp_path / "data", elements), workers=workers)
    with pytest.raises(WindowError, match=message):
        list(score_filter(loader, tmp_path))


def test_a_missing_key_names_the_columns(mds, tmp_path):
    publish(tmp_path)
    kept = score_filter(make_loader(mds), tmp_path, windows=mgf.TextWindows("text"))
    with pytest.raises(WindowError, match="no key 'text', available"):
        list(kept)


def test_other_loaders_and_blocks_are_refused(mds, tmp_path):
    with pytest.raises(ConfigError, match=r"StreamingDataLoader over a streaming"):
        score_filter(torch.utils.data.DataLoader([1, 2]), tmp_path)
    with pytest.raises(ConfigError, match="multiple of batch_size 4"):
        score_filter(make_loader(mds), tmp_path, block_windows=10)
    with pytest.raises(ConfigError, match="order of arrival"):
        score_filter(make_loader(mds), tmp_path, rule="threshold")
    loader = make_loader(mds)
    with pytest.raises(ConfigError, match="batch_size is 2 in the loader and 4"):
        score_filter(streaming.StreamingDataLoader(loader.dataset, batch_size=2), tmp_path)
    kept = score_filter(make_loader(mds), tmp_path)
    state = kept.state_dict()
    other = score_filter(make_loader(mds), tmp_path, name="other")
    with pytest.raises(StateMismatch, match="name='default'"):
        other.load_state_dict(state)
