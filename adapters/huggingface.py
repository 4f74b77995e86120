"""The filter behind Hugging Face `datasets`: a `Dataset` or an `IterableDataset` comes back.

    ds = score_filter(ds, "run", keep_ratio=0.25, windows=TextWindows("tokens"))

An `IterableDataset` is filtered by its own `.filter` in batches of M examples, so `.map`, `.batch`,
`.with_format`, `DataLoader` workers and `split_dataset_by_node` go on working, and its own
`state_dict` and `load_state_dict` resume exactly: a checkpoint keeps the position at the start of
the batch, and choosing from it again gives the same windows as long as the run's ledger is there.
Blocks are counted by whoever reads shards: by each worker, and by each node if the number of shards
is a multiple of the nodes; otherwise all nodes choose from all examples alike and share out what is
kept. A shuffle buffer before the filter is refilled with other examples on resume, which `datasets`
says of itself; put the filter before the buffer, or shuffle files. A new pass replays the scorer
versions of the first.

A `Dataset` is read once, now, and comes back as `Dataset.select` of the kept indices: exact and
simple, but every interval is decided at once by the newest scorer. To go on learning while it is
read, filter `ds.to_iterable_dataset(num_shards=...)`, or use `metagrad_filter.adapters.torch`,
which filters any dataset with random access lazily.

Cost: examples become Python lists on the way, as in every batched `.filter`. Read next:
`stream.py`.
"""

from __future__ import annotations

import os
from typing import Any, Unpack

import numpy as np

from metagrad_filter.blocks import BlockFilter, Choice, FilterConfig
from metagrad_filter.errors import ConfigError, WindowError

from .options import Options, configure, framework, refuse_threshold

datasets = framework("datasets", "huggingface")


def score_filter(dataset: Any, run_dir: str | os.PathLike[str], **options: Unpack[Options]) -> Any:
    """Keeps the examples of a Hugging Face dataset that the published scorers rank highest.

    Args:
      dataset: a `Dataset` or an `IterableDataset`; an example holds one window.
      run_dir: directory shared with the calibrator.
      options: see `options.Options`; `windows` needs a key.

    Returns:
      A dataset of the same kind.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      WindowError: the dataset is empty, or an example is no window; of an `IterableDataset`
        while iterating.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
    """
    if isinstance(dataset, datasets.Dataset):
        return _selected(dataset, configure(run_dir, order="index", **options))
    if not isinstance(dataset, datasets.IterableDataset):
        raise ConfigError(
            f"dataset is a {type(dataset).__name__}, expected a datasets.Dataset or "
            "datasets.IterableDataset; of a DatasetDict filter each split under its own name=."
        )
    refuse_threshold(options.get("rule"), "examples come in batches that are resumed as a whole")
    config = configure(run_dir, **options)
    formatting = getattr(dataset, "_formatting", None)
    if formatting is not None and formatting.is_table:
        raise ConfigError(
            f"dataset has the format {formatting.format_type!r}, whose batches do not tell where "
            "they are; filter first and call .with_format after."
        )
    config.bind()
    batches: dict[str, Any] = {
        "batched": True,
        "batch_size": config.block_windows,
        "with_indices": True,
    }
    if not config.annotate:
        return dataset.filter(_Mask(config), **batches)
    if dataset.features is not None:
        batches["features"] = datasets.Features(
            {
                **dataset.features,
                "score": datasets.Value("float32"),
                "scorer_version": datasets.Value("int64"),
            }
        )
    return dataset.map(_Annotated(config), **batches)


class _Block:
    """Chooses from a batch of columns; travels to worker processes without its scorers."""

    def __init__(self, config: FilterConfig):
        self._config = config
        self._filter: BlockFilter | None = None

    def choose(
        self, batch: dict[str, Any], indices: list[int]
    ) -> tuple[list[dict[str, Any]], Choice]:
        if self._filter is None:
            self._filter = BlockFilter(self._config)
        elements = [{name: batch[name][i] for name in batch} for i in range(len(indices))]
        # Batches are cut from the start and only the last may be short: M divides every start.
        start = indices[0]
        return elements, self._filter.choose(start // self._config.block_windows, start, elements)

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config, "_filter": None}


class _Mask(_Block):
    def __call__(self, batch: dict[str, Any], indices: list[int]) -> list[bool]:
        mask = np.zeros(len(indices), bool)
        mask[self.choose(batch, indices)[1].kept] = True
        return mask.tolist()


class _Annotated(_Block):
    def __call__(self, batch: dict[str, Any], indices: list[int]) -> dict[str, list[Any]]:
        elements, choice = self.choose(batch, indices)
        kept = [choice.annotated(int(p), elements[int(p)]) for p in choice.kept]
        return {name: [e[name] for e in kept] for name in [*batch, "score", "scorer_version"]}


def _selected(dataset: Any, config: FilterConfig) -> Any:
    if len(dataset) == 0:
        raise WindowError(
            "The dataset has length 0, expected at least one window; check the source's files "
            "and earlier filters."
        )
    config.bind()
    block = BlockFilter(config)
    indices: list[int] = []
    scores: list[float] = []
    versions: list[int] = []
    size = config.block_windows
    for number, start in enumerate(range(0, len(dataset), size)):
        batch = dataset[start : start + size]
        n = min(size, len(dataset) - start)
        elements = [{name: batch[name][i] for name in batch} for i in range(n)]
        choice = block.choose(number, start, elements)
        for position in choice.kept:
            indices.append(start + int(position))
            if config.annotate:
                marked = choice.annotated(int(position), elements[int(position)])
                scores.append(float(marked["score"]))
                versions.append(int(marked["scorer_version"]))
    kept = dataset.select(indices)
    if config.annotate:
        kept = kept.add_column("score", np.array(scores, np.float32))
        kept = kept.add_column("scorer_version", np.array(versions, np.int64))
    return kept
