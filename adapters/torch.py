"""The filter behind `torch.utils.data`: the same kind of dataset comes back, shorter.

    kept = score_filter(dataset, "run", keep_ratio=0.25, windows=TextWindows("tokens"))
    loader = DataLoader(kept, batch_size=32, num_workers=4)      # or torchdata's stateful one

A map-style dataset gives a map-style dataset of exact length with blocks by index: the same windows
for any sampler, any number of workers and ranks. Shuffle its source, not its output: a sampler that
jumps reads a whole block for each window. An `IterableDataset` gives an `IterableDataset`: each
worker filters the windows that the source gives to that worker and counts its own blocks, so the
stream is reproducible for a fixed number of workers. Its iterators have `state_dict` and
`load_state_dict`, which `StatefulDataLoader` calls in each worker. A map-style dataset needs no
state beside the sampler's.

Epochs: a new pass over an `IterableDataset` replays the scorer versions of the first; repeat the
source before the filter for a stream that goes on learning. Map-style datasets have `set_epoch`.

Read next: `stream.py`, `sequence.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Unpack

from metagrad_filter.blocks import FilterConfig
from metagrad_filter.errors import ConfigError

from .options import Options, configure, framework
from .sequence import FilteredSequence
from .stream import FilteredStream

torch = framework("torch", "torch")
torch_data = framework("torch.utils.data", "torch")


def score_filter(
    dataset: Any, run_dir: str | os.PathLike[str], **options: Unpack[Options]
) -> ScoreFilterDataset | ScoreFilterIterableDataset:
    """Keeps the windows of a torch dataset that the published scorers rank highest.

    Args:
      dataset: an `IterableDataset`, or a map-style dataset with `len`; one window per element.
      run_dir: directory shared with the calibrator.
      options: see `options.Options`.

    Returns:
      A dataset of the same kind.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      WindowError: the dataset is empty; while iterating also for elements that are no windows.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
    """
    if isinstance(dataset, torch_data.IterableDataset):
        if type(dataset).__module__.partition(".")[0] == "datasets":
            raise ConfigError(
                "dataset is an IterableDataset of Hugging Face, which shares out its shards and "
                "saves its state by itself; use metagrad_filter.adapters.huggingface.score_filter."
            )
        return ScoreFilterIterableDataset(dataset, configure(run_dir, **options))
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigError(
            f"dataset is a {type(dataset).__name__}, expected a torch IterableDataset or a "
            "map-style dataset with __getitem__ and __len__; filter the dataset, not its loader."
        )
    return ScoreFilterDataset(dataset, configure(run_dir, order="index", **options))


class ScoreFilterDataset(torch_data.Dataset):
    """Map-style filter; see `score_filter`."""

    def __init__(self, dataset: Any, config: FilterConfig):
        self._kept = FilteredSequence(dataset, config)
        # Shared memory, so that workers that live on see the next epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Says which pass this is, from 0, before the loader is iterated.

        Block numbers count on from epoch to epoch, so that each ranks with the versions of its own
        time. Without this call every pass replays the first.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ConfigError(f"epoch is {epoch!r}, expected an int >= 0.")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Any:
        return self._kept.element(index, int(self._epoch))


class ScoreFilterIterableDataset(torch_data.IterableDataset):
    """Iterable filter; see `score_filter`."""

    def __init__(self, dataset: Any, config: FilterConfig):
        config.bind()
        self._dataset = dataset
        self._config = config

    def __iter__(self) -> Iterator[Any]:
        # With workers, one that has no part of the source is nothing unusual.
        may_be_empty = torch_data.get_worker_info() is not None
        return FilteredStream(self._dataset, self._config, may_be_empty=may_be_empty)
