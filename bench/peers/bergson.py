"""Metagradients of one GPT-2 trajectory by bergson's MAGIC and by `metagradients`, side by side.

Answers whether two independent implementations (PyTorch with torchopt, JAX with optax) find the
same scores, and what each costs on a CPU. Output: `bench/records/bergson.json`.

python -m bench.peers.bergson                  run every case and store the record; minutes
python -m bench.peers.bergson --case tiny-16   run one case and print its rows; stores nothing
python -m bench.peers.bergson --table          print the table of the stored record

Installation: a CPU build of torch first, then `pip install --no-deps bergson` and `pip install
accelerate datasets natsort peft petname simple-parsing torchopt`. Without `--no-deps`, bergson's
torchvision and bitsandbytes replace torch by a CUDA build of several gigabytes; neither they nor
torchaudio are imported here. Where that is welcome, `pip install 'metagrad-filter[peers]'` does.

What is compared: bergson's own `prepare_trainer`, `Trainer.train`, `compute_query_gradients` and
`Trainer.backward`, in the order in which its command runs them, with its eager attention. Its inner
loop is expressed in our terms:

* The loss of a step is the weighted sum over tokens divided by the number of tokens in the batch;
  with windows of one length that is `sum_i w_i loss_i / B`, loss_i the mean nats of a window.
* torchopt's AdamW (bias correction, `eps_root` inside the root, `eps` outside, decoupled weight
  decay on every parameter, constant rate) is `optax.adamw` with the same numbers.
* The query is the mean loss of held-out windows. bergson returns dPhi/dw, we return -dPhi/dw.
* Both start from the same weights and, in warm cases, the same moments and step count. bergson's
  command starts cold; its `TrainerState` takes warm moments.

What differs: bergson keeps the trajectory in checkpoint files (the operating system's page cache is
not counted against it), every sqrt(T)-th step by default, and replays between them. Its model reads
the last token of a window, whose output is not used. We keep the trajectory in memory, and compile:
the first call, with its own time and peak, is therefore listed apart, and later calls run in a
process that loaded the compiled program from jax's compilation cache. `baseline_bytes` of the
record is what each process held before, packages included.

The output layer is not tied to the input embedding. With tied weights bergson 2.5.1 keeps two sets
of moments and adds both updates to the one tensor in its forward pass but not in its traced replay,
so that its scores are not the derivative of its own training.

Repetitions are interleaved, one engine at a time, on one pinned core: `bench/peers/measure.py` says
what seconds and bytes mean.

References:
  Ilyas and Engstrom, 2025, https://arxiv.org/abs/2504.16430 (MAGIC).
  bergson, https://github.com/EleutherAI/bergson, module `bergson.magic`.
"""

# pyright: reportMissingImports=false
# bergson and its dependencies are no part of the development environment.

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.measure import EngineProcess
from metagrad_filter.errors import ConfigError

RECORD = Path(__file__).parent.parent / "records" / "bergson.json"
_PACKAGES = ("bergson", "torch", "torchopt", "transformers", "jax", "flax", "optax", "numpy")
# AdamW: betas, eps and weight decay are bergson's defaults; eps_root keeps cold starts smooth.
_RATE, _BETAS, _EPS, _EPS_ROOT, _DECAY = 1e-3, (0.95, 0.975), 1e-8, 1e-8, 0.01
_WARM_UP = 32  # steps from the initial weights to the warm start
_QUERY = 64  # held-out windows
_START = "start.safetensors"  # weights, moments and step count


@dataclass(frozen=True)
class Case:
    """One trajectory and how it is measured.

    Attributes:
      name: the row in the record.
      steps, batch, length: T, B and tokens per window.
      width, layers, heads, vocab: shape of the GPT-2.
      warm: whether it starts after some training, with that training's moments.
      precision: "fp32" or "fp64".
      repetitions: timed runs after the first one; 0 compares scores only.
      seed: decides weights and data.
    """

    name: str
    steps: int
    batch: int = 16
    length: int = 64
    width: int = 64
    layers: int = 2
    heads: int = 4
    vocab: int = 512
    warm: bool = True
    precision: str = "fp32"
    repetitions: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.precision not in ("fp32", "fp64"):
            raise ConfigError(f"precision={self.precision!r}; expected 'fp32' or 'fp64'.")
        if min(self.steps, self.batch, self.layers, self.vocab) < 1 or self.repetitions < 0:
            raise ConfigError(f"{self}; expected positive sizes and repetitions >= 0.")


CASES = (
    Case("tiny-16", steps=16, repetitions=3),
    Case("tiny-48", steps=48, repetitions=3),
    Case("small-16", steps=16, batch=8, width=192, layers=4, vocab=1024, repetitions=2),
    Case("tiny-16-cold", steps=16, warm=False),
    Case("tiny-16-float64", steps=16, precision="fp64"),
)


def draw_windows(case: Case) -> dict[str, np.ndarray]:
    """Windows of four sources, each a Markov chain with eight successors per token, and noise.

    Returns:
      `warm_up` `(32, B, L)`, `train` `(T, B, L)` and `query` `(64, L)` int32; the query windows
      come from the first source only, so that sources differ in worth.
    """
    rng = np.random.default_rng(case.seed)
    successors = rng.integers(0, case.vocab, (4, case.vocab, 8))

    def chain(source: np.ndarray) -> np.ndarray:
        tokens = rng.integers(0, case.vocab, (len(source), case.length))
        for t in range(1, case.length):
            follow = successors[source % 4, tokens[:, t - 1], rng.integers(0, 8, len(source))]
            tokens[:, t] = np.where(source < 4, follow, tokens[:, t])
        return tokens.astype(np.int32)

    def batches(steps: int) -> np.ndarray:
        flat = chain(rng.integers(0, 5, steps * case.batch))
        return flat.reshape(steps, case.batch, case.length)

    return {
        "warm_up": batches(_WARM_UP),
        "train": batches(case.steps),
        "query": chain(np.zeros(_QUERY, int)),
    }


def gpt2_shape(case: Case) -> dict[str, Any]:
    """Fields that `DecoderConfig` and `transformers.GPT2Config` have in common."""
    return {
        "vocab_size": case.vocab,
        "n_positions": case.length,
        "n_embd": case.width,
        "n_layer": case.layers,
        "n_head": case.heads,
        "tie_word_embeddings": False,
    }


def hugging_face_name(path: tuple[Any, ...]) -> str:
    """`h.0.attn.c_attn.kernel` -> `transformer.h.0.attn.c_attn.weight`; shapes are the same."""
    keys = [str(entry.key) for entry in path]
    last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(keys[-1], keys[-1])
    prefix = [] if keys[0] == "lm_head" else ["transformer"]
    return ".".join([*prefix, *keys[:-1], last])


class Ours:
    """`metagrad_filter.metagradients` on the case."""

    def __init__(self, case: Case, folder: Path):
        import jax
        import optax
        from safetensors.numpy import load_file

        from metagrad_filter.proxy import DecoderConfig, DecoderLoss, init_decoder
        from metagrad_filter.targets import mean_loss

        jax.config.update("jax_enable_x64", case.precision == "fp64")
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        self.case, self.folder = case, folder
        self.windows = draw_windows(case)
        config = DecoderConfig(**gpt2_shape(case))
        self.loss = DecoderLoss(config)
        self.outer = mean_loss(self.loss, self.windows["query"], case.batch)
        self.optimizer = optax.adamw(
            _RATE, *_BETAS, eps=_EPS, eps_root=_EPS_ROOT, weight_decay=_DECAY
        )
        params = init_decoder(config, seed=case.seed)
        state: Any = self.optimizer.init(params)
        if (folder / _START).exists():
            start = load_file(folder / _START)
            dtype = np.float64 if case.precision == "fp64" else np.float32

            def load(kind: str) -> Any:
                return jax.tree.map_with_path(
                    lambda path, _: jax.numpy.asarray(
                        start[f"{kind}/{hugging_face_name(path)}"], dtype
                    ),
                    params,
                )

            adam = {"count": jax.numpy.int32(start["count"]), "mu": load("mu"), "nu": load("nu")}
            params, state = load("params"), (state[0]._replace(**adam), *state[1:])
        self.params, self.state = jax.block_until_ready((params, state))

    def run(self) -> tuple[np.ndarray, float]:
        """Scores `(T, B)` and Phi."""
        from metagrad_filter import metagradients

        batches = self.windows["train"]
        result = metagradients(
            self.loss, self.outer, self.params, self.state, batches, optimizer=self.optimizer
        )
        return np.asarray(result.scores), float(result.phi)


class Start(Ours):
    """Writes the weights and moments that both engines start from."""

    def run(self) -> None:
        import jax
        from safetensors.numpy import save_file
        from transformers import GPT2Config

        from metagrad_filter.metagradient.trajectory import run

        params, state = self.params, self.state
        if self.case.warm:
            batches = self.windows["warm_up"]
            train = jax.jit(lambda *start: run(self.loss, self.optimizer, *start)[:2])
            params, state = train(params, state, batches, np.ones(batches.shape[:2], np.float32))

        def named(tree: Any) -> dict[str, np.ndarray]:
            leaves = jax.tree.leaves_with_path(tree)
            return {hugging_face_name(path): np.asarray(leaf, np.float32) for path, leaf in leaves}

        parts = {"params": named(params), "mu": named(state[0].mu), "nu": named(state[0].nu)}
        arrays = {f"{kind}/{name}": x for kind, part in parts.items() for name, x in part.items()}
        save_file({**arrays, "count": np.asarray(state[0].count)}, self.folder / _START)
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            **gpt2_shape(self.case),
            **no_dropout,
            bos_token_id=0,
            eos_token_id=0,
            architectures=["GPT2LMHeadModel"],
        )
        config.save_pretrained(self.folder)
        save_file(parts["params"], self.folder / "model.safetensors", metadata={"format": "pt"})


class Bergson:
    """bergson's trainer on the case, called as its command calls it."""

    def __init__(self, case: Case, folder: Path):
        import torch
        from bergson.config.config import LRScheduleConfig, TrainingConfig
        from bergson.magic import prepare_trainer
        from datasets import Dataset
        from safetensors.numpy import load_file
        from torchopt.pytree import tree_leaves

        if case.precision == "fp64":
            torch.set_default_dtype(torch.float64)  # loss weights and bias correction too
        self.case = case
        schedule = LRScheduleConfig(lr=_RATE, lr_scheduler_type="constant")
        config = TrainingConfig(
            run_path=str(folder / "run"),
            model=str(folder),
            precision=case.precision,
            lr_schedule=schedule,
            batch_size=case.batch,
            adam_beta1=_BETAS[0],
            adam_beta2=_BETAS[1],
            adam_eps=_EPS,
            eps_root=_EPS_ROOT,
            weight_decay=_DECAY,
        )
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            made = prepare_trainer(config, 0, schedule.get_schedule(case.steps))
        self.trainer, self.state, self.model = made
        start, adam = load_file(folder / _START), self.state.opt_state[0]
        # torchopt flattens the dict of parameters; a dict of their names flattens the same way.
        names = tree_leaves({name: name for name in self.state.params})
        for kind, moments in (("mu", adam.mu), ("nu", adam.nu)):
            for name, moment in zip(names, moments, strict=True):
                moment.copy_(torch.from_numpy(start[f"{kind}/{name}"]))
        for count in adam.count:
            count.fill_(int(start["count"]))
        self.start = self.state.to("cpu").detach_()
        windows = draw_windows(case)
        flat = windows["train"].reshape(-1, case.length)
        self.train = Dataset.from_dict({"input_ids": flat.tolist()})
        self.query = Dataset.from_dict({"input_ids": windows["query"].tolist()})

    def run(self) -> tuple[np.ndarray, float]:
        """Scores `(T, B)`, that is -dPhi/dw, and Phi."""
        import torch
        from bergson.magic import BackwardState, DataStream
        from bergson.magic.cli import compute_query_gradients
        from torchopt.pytree import tree_iter

        state = self.state.detach_()
        state.copy_(self.start)
        stream = DataStream(self.train, self.case.batch)
        query = DataStream(self.query, self.case.batch)
        # Its progress bars go to standard error whatever the environment says.
        with (
            tempfile.TemporaryDirectory() as checkpoints,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            state = self.trainer.train(state, stream, inplace=True, save_dir=checkpoints)
            gradient, phi = compute_query_gradients(state, self.model, query)
            stream.requires_grad = True
            floats = [x for x in tree_iter(state.opt_state) if torch.is_tensor(x)]
            moments = [torch.zeros_like(x) for x in floats if x.is_floating_point()]
            backward = BackwardState(gradient, moments, torch.zeros_like(stream.weights))
            done = self.trainer.backward(checkpoints, stream, backward, state, inplace=True)
        scores = -done.weight_grads.detach().numpy()
        return scores.reshape(self.case.steps, self.case.batch), phi


def run_case(case: Case) -> dict[str, Any]:
    """Runs both engines on the case, one at a time; returns its part of the record."""
    from scipy.stats import spearmanr

    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        start = EngineProcess(Start, case, Path(name), name="start")
        start.run()
        start.stop()
        compiling = EngineProcess(Ours, case, Path(name), name="ours, compiling")
        first = {"ours": compiling.run()}
        compiling.stop()
        engines = {
            made.__name__.lower(): EngineProcess(made, case, Path(name), name=made.__name__)
            for made in (Ours, Bergson)
        }
        first["bergson"] = engines["bergson"].run()
        samples: dict[str, list[dict[str, float]]] = {"ours": [], "bergson": []}
        if case.repetitions:
            engines["ours"].run()  # loads the program
        for _ in range(case.repetitions):
            for engine, process in engines.items():
                samples[engine].append(process.run()[1])
        for process in engines.values():
            process.stop()

    ((a, our_phi), _), ((b, their_phi), _) = first["ours"], first["bergson"]
    a, b = a.ravel().astype(float), b.ravel().astype(float)
    record: dict[str, Any] = {
        "case": asdict(case),
        "load_average": [round(x, 2) for x in load],
        "agreement": {
            "pearson": float(np.corrcoef(a, b)[0, 1]),
            "spearman": float(spearmanr(a, b)[0]),  # pyright: ignore[reportArgumentType]
            "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
            "score_deviation": float(b.std()),
            "phi": {"ours": our_phi, "bergson": their_phi},
        },
        "first_call": {engine: cost for engine, (_, cost) in first.items()},
        "baseline_bytes": {engine: process.baseline_bytes for engine, process in engines.items()},
    }
    if case.repetitions:
        record["samples"] = samples
        record["median"] = {
            engine: {key: float(np.median([s[key] for s in made])) for key in made[0]}
            for engine, made in samples.items()
        }
        ours, theirs = record["median"]["ours"], record["median"]["bergson"]
        record["bergson_over_ours"] = {key: theirs[key] / ours[key] for key in ours}
    return record


def table(record: dict[str, Any]) -> str:
    """Markdown of a record: agreement of every case, then cost of the timed ones."""
    lines = ["| case | Pearson | Spearman | relative L2 |", "|---|---|---|---|"]
    for part in record["cases"]:
        found = part["agreement"]
        lines.append(
            f"| {part['case']['name']} | {found['pearson']:.8f} | {found['spearman']:.8f} "
            f"| {found['relative_l2']:.1e} |"
        )
    lines += [
        "",
        "| case | engine | first call, CPU s | MB | later calls, CPU s | MB |",
        "|---|---|---|---|---|---|",
    ]
    for part in (part for part in record["cases"] if "median" in part):
        for engine, cost in part["median"].items():
            first = part["first_call"][engine]
            lines.append(
                f"| {part['case']['name']} | {engine} "
                f"| {first['cpu_s']:.1f} | {first['peak_bytes'] / 1e6:.0f} "
                f"| {cost['cpu_s']:.2f} | {cost['peak_bytes'] / 1e6:.0f} |"
            )
        ratio = part["bergson_over_ours"]
        lines.append(f"| | ratio | | | {ratio['cpu_s']:.2f} | {ratio['peak_bytes']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments == ["--table"]:
        print(table(json.loads(RECORD.read_text())))
        return
    named = {case.name: case for case in CASES}
    one = len(arguments) == 2 and arguments[0] == "--case" and arguments[1] in named
    if arguments and not one:
        sys.exit(
            f"bench.peers.bergson: unknown arguments {arguments}; expected none, --table, or "
            f"--case with one of {', '.join(named)}"
        )
    if importlib.util.find_spec("bergson") is None:
        sys.exit(
            "bench.peers.bergson: the package bergson is not installed; the first lines of "
            f"{Path(__file__).name} say how to install it beside a CPU build of torch."
        )
    record: dict[str, Any] = {
        "versions": {package: version(package) for package in _PACKAGES},
        "environment": {"cpus": os.cpu_count(), "pinned_cores": 1, "machine": platform.machine()},
        "optimizer": {
            "name": "adamw",
            "learning_rate": _RATE,
            "betas": _BETAS,
            "eps": _EPS,
            "eps_root": _EPS_ROOT,
            "weight_decay": _DECAY,
        },
        "cases": [],
    }
    for case in [named[arguments[1]]] if one else CASES:
        record["cases"].append(run_case(case))
        print(f"{case.name}: done", flush=True)
    if not one:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
