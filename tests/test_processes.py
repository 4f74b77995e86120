"""Two processes with two simulated devices each agree with one process that has one.

Each process holds half of every batch; collectives run over the loopback interface.
"""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagrad_filter.metagradient import metagradients, probe_scores
from metagrad_filter.sharding import data_mesh, shard_batches, shard_params, shard_windows

STEPS, BATCH, FEATURES, WIDTH = 3, 8, 4, 8
OPTIMIZER = optax.adamw(0.01, b2=0.95)


def loss(params, windows):
    x, y = windows[:, :FEATURES], windows[:, FEATURES]
    return (jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2


def world():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    params = {"up": normal(FEATURES, WIDTH), "down": normal(WIDTH)}
    state = OPTIMIZER.init(params)
    for _ in range(5):
        x = normal(BATCH, FEATURES + 1)
        gradient = jax.grad(lambda p, x=x: loss(p, x).mean())(params)
        state = OPTIMIZER.update(gradient, state, params)[1]
    held_out = normal(24, FEATURES + 1)
    return params, jax.tree.map(np.asarray, state), normal(STEPS, BATCH, FEATURES + 1), held_out


def run(fsdp=None, tape="state"):
    """What every process ends up with, as JSON."""
    params, state, batches, held_out = world()
    outer_windows = held_out[:16]
    windows = held_out
    if fsdp is not None:
        mesh = data_mesh(fsdp=fsdp)
        index, count = jax.process_index(), jax.process_count()
        mine = np.split(batches, count, axis=1)[index]
        params, state = shard_params(mesh, params), shard_params(mesh, state)
        batches = shard_batches(mesh, mine)
        windows = shard_windows(mesh, np.split(held_out, count)[index])
    result = metagradients(
        loss,
        lambda p: loss(p, outer_windows).mean(),
        params,
        state,
        batches,
        optimizer=OPTIMIZER,
        tape=tape,  # pyright: ignore[reportArgumentType]
    )
    found = {
        "phi": float(result.phi),
        "scores": np.asarray(result.scores).tolist(),
        "probe scores": probe_scores(loss, params, result.probe, held_out).tolist(),
        "of sharded windows": probe_scores(loss, params, result.probe, windows).tolist(),
    }
    shards = result.probe["up"].addressable_shards
    return found, {"devices": jax.device_count(), "share": shards[0].data.size / (FEATURES * WIDTH)}


def main(port, index, *cases):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    return [run(int(case.split()[0]), case.split()[1]) for case in cases]


CASES = ["1 state", "4 gradient", "2 segments"]


@pytest.fixture(scope="module")
def found():
    """Results by process, then by case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        f"import json, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
        "import test_processes; print(json.dumps(test_processes.main(*sys.argv[1:])))"
    )
    flags = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(index), *CASES],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ended = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, ended):
        assert process.returncode == 0, error[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


@pytest.mark.parametrize("case", CASES)
def test_both_processes_get_what_one_alone_gets(found, case):
    alone, _ = run()
    for process in found:
        here, where = process[CASES.index(case)]
        assert where == {"devices": 4, "share": 1 / int(case[0])}
        for name, expected in alone.items():
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                here[name], expected, rtol=0, atol=1e-5 * scale, err_msg=name
            )
