"""One stream, whatever happens: runs, workers, racing publishers, resumes, kills, hosts."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import grain
import pytest
from hotlane import make_elements
from test_filter import PATHS, Published, as_iter, drain, filtered, worker_stream

pytestmark = pytest.mark.slow


def digest(stream) -> str:
    return hashlib.sha256(json.dumps(stream).encode()).hexdigest()


def test_a_map_stream_is_one_for_all_runs_and_workers_under_a_racing_publisher(tmp_path):
    digests = set()
    with Published(tmp_path):
        for workers in (0, 1, 2, 4):
            for _ in range(3):
                digests.add(digest(drain(worker_stream(tmp_path, "map", workers))))
    assert len(digests) == 1


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_an_iter_stream_is_one_for_all_runs_of_a_number_of_workers(tmp_path, workers):
    with Published(tmp_path):
        digests = {digest(drain(worker_stream(tmp_path, "iter", workers))) for _ in range(3)}
    assert len(digests) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_resumes_give_the_rest_of_the_stream(tmp_path, path, workers):
    with Published(tmp_path):
        iterator = iter(worker_stream(tmp_path, path, workers))
        states, batches = [], []
        while True:
            states.append(json.dumps(iterator.get_state()))
            try:
                batches.append(next(iterator))
            except StopIteration:
                break
        points = random.Random(0).sample(range(len(batches)), 20 if workers == 0 else 6)
        for point in points:
            resumed = iter(worker_stream(tmp_path, path, workers))
            resumed.set_state(json.loads(states[point]))
            assert drain(resumed) == drain(batches[point:])


KILLED = """
import json, sys
from test_filter import as_iter, filtered, make_elements
run_dir, path, state = sys.argv[1:]
iterator = iter(as_iter(filtered(make_elements(4000), run_dir, path)).batch(3))
if state:
    iterator.set_state(json.loads(state))
for batch in iterator:
    print(json.dumps([batch["index"].tolist(), iterator.get_state()]), flush=True)
"""


@pytest.mark.parametrize("path", PATHS)
def test_twenty_kills_lose_and_repeat_nothing(tmp_path, path):
    stream, state, chance = [], "", random.Random(1)
    with Published(tmp_path):
        for _ in range(20):
            process = subprocess.Popen(
                [sys.executable, "-c", KILLED, str(tmp_path), path, state],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent,
            )
            assert process.stdout is not None
            # The last line that was read stands for the last checkpoint; what came after is lost.
            for _ in range(chance.randint(1, 15)):
                batch, position = json.loads(process.stdout.readline())
                stream += batch
            state = json.dumps(position)
            os.kill(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        ds = as_iter(filtered(make_elements(4000), tmp_path, path)).batch(3)
        resumed = iter(ds)
        resumed.set_state(json.loads(state))
        stream += [int(i) for batch in resumed for i in batch["index"]]
        assert stream == [int(i) for batch in ds for i in batch["index"]]
    assert len(stream) == len(set(stream)) == 1200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_keep_in_step_whatever_their_shards_hold(tmp_path, path, hosts):
    # Adversarial: sorted by score, so that the first hosts hold the worst windows.
    elements = make_elements(1600)
    elements.sort(key=lambda element: int(element["tokens"].sum()))
    size = len(elements) // hosts
    iterators = []
    for host in range(hosts):
        shard = elements[host * size : (host + 1) * size]
        ds = filtered(shard, tmp_path, path, name=f"host-{host}", keep_ratio=0.3)
        iterators.append(iter(as_iter(ds).batch(2, drop_remainder=True)))
    steps = 0
    while True:
        got = [next(iterator, None) is not None for iterator in iterators]
        assert len(set(got)) == 1
        if not got[0]:
            break
        steps += 1
    assert steps == int(size * 0.3) // 2


def test_four_workers_under_packing_and_prefetch_resume(tmp_path):
    def stream():
        ds = filtered(make_elements(800), tmp_path, "iter", keep_ratio=0.5)
        ds = grain.experimental.WindowShuffleIterDataset(ds, window_size=7, seed=0)
        return ds.batch(3).mp_prefetch(grain.MultiprocessingOptions(4))

    with Published(tmp_path):
        iterator = iter(stream())
        batches = [next(iterator) for _ in range(9)]
        state = json.dumps(iterator.get_state())
        rest = [batch["index"].tolist() for batch in iterator]
        resumed = iter(stream())
        resumed.set_state(json.loads(state))
        assert [batch["index"].tolist() for batch in resumed] == rest
        assert len(batches) == 9
