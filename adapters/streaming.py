"""The filter behind MosaicML Streaming: a `StreamingDataLoader` in, a loader of kept batches out.

    loader = StreamingDataLoader(dataset, batch_size=32, num_workers=4)
    loader = score_filter(loader, "run", keep_ratio=0.25, windows=TextWindows("tokens"))
    for batch in loader: ...                         # json.dumps(loader.state_dict()) at any step

Streaming plans an epoch's order ahead and resumes by the number of samples that were read. A filter
inside the dataset would make it count kept samples instead, so this one sits behind the loader, in
the main process of each rank: it reads samples in the rank's order, filters them, and batches what
is kept with the loader's own `collate_fn`. Its state is theirs, at the start of the current block.

Exact: each rank keeps `floor(n r)` of its first n samples, so ranks never differ in the number of
batches; Streaming gives a rank the same order for any number of workers, hence the kept stream is
the same too, and a checkpoint may be resumed with another number of workers. Not kept: which
windows share a block depends on the number of ranks, so another number of ranks keeps other
windows. Block numbers count on over epochs.

Cost: samples cross from the workers to the main process before they are filtered, and are scored
there; a resume reads at most one block again. Read next: `stream.py`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, Unpack

from metagrad_filter.blocks import FilterConfig
from metagrad_filter.errors import ConfigError
from metagrad_filter.selection import kept_before

from .options import Options, configure, framework, refuse_threshold
from .stream import FilteredStream

# Its pins exclude this package's transformers, with which it works nevertheless.
_INSTALL = (
    "pip install 'metagrad-filter[adapters]' torchvision python-snappy zstd brotli xxhash "
    "catalogue, then pip install --no-deps mosaicml-streaming"
)

streaming = framework("streaming", "streaming", install=_INSTALL)
torch_data = framework("torch.utils.data", "streaming")


def score_filter(
    loader: Any, run_dir: str | os.PathLike[str], **options: Unpack[Options]
) -> ScoreFilterLoader:
    """Keeps the samples of a Streaming loader that the published scorers rank highest.

    Args:
      loader: over a `StreamingDataset`, not iterated yet; it is taken over, so use only what is
        returned. `block_windows` must be a multiple of its `batch_size`.
      run_dir: directory shared with the calibrator.
      options: see `options.Options`.

    Returns:
      A loader of batches of kept samples, one epoch per iteration.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
    """
    refuse_threshold(options.get("rule"), "an epoch is resumed at whole batches")
    return ScoreFilterLoader(loader, configure(run_dir, **options))


class ScoreFilterLoader:
    """Batches of kept samples with a state; see `score_filter`."""

    def __init__(self, loader: Any, config: FilterConfig):
        dataset: Any = getattr(loader, "dataset", None)
        if not isinstance(loader, streaming.StreamingDataLoader) or not isinstance(
            dataset, streaming.StreamingDataset
        ):
            raise ConfigError(
                f"loader is a {type(loader).__name__} over {type(dataset).__name__}, expected a "
                "streaming.StreamingDataLoader over a streaming.StreamingDataset; other loaders "
                "have other adapters."
            )
        size = loader.batch_size
        if size is None or size != dataset.batch_size:
            raise ConfigError(
                f"batch_size is {size} in the loader and {dataset.batch_size} in the dataset, "
                "expected the same int: the order of an epoch depends on it."
            )
        if config.block_windows % size:
            raise ConfigError(
                f"block_windows is {config.block_windows}, expected a multiple of batch_size "
                f"{size}: an epoch is resumed at whole batches."
            )
        config.bind()
        self._config = config
        self._length = len(dataset)
        self._batch_size = size
        self._drop_last = loader.drop_last
        self._collate = loader.collate_fn
        loader.collate_fn = list
        self._samples = _Samples(loader, dataset)
        self._stream = self._new(0)
        self._begun = False

    def _new(self, first_block: int) -> FilteredStream:
        return FilteredStream(self._samples, self._config, first_block=first_block)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        kept = kept_before(self._length, self._config.keep_ratio)
        return kept // self._batch_size if self._drop_last else -(-kept // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self._stream = self._new(self._stream.block)
        self._begun = True
        stream = self._stream
        while batch := list(itertools.islice(stream, self._batch_size)):
            if len(batch) < self._batch_size and self._drop_last:
                return
            yield self._collate(batch)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's position: JSON types, constant structure, under 1 KiB.

        Before the first batch it starts the loader, which is when Streaming knows its epoch.
        """
        return self._stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Goes to a position; the next iteration gives the rest of its epoch.

        Raises:
          StateMismatch: the state is another filter's; names the first field that differs.
        """
        stream = self._new(0)
        stream.load_state_dict(state_dict)
        if stream.ended:
            # Nothing of this epoch will be read, so the dataset has to be told that it is over.
            self._samples.start_epoch(int(state_dict["parent"]["epoch"]) + 1)
        self._stream, self._begun = stream, False


class _Samples:
    """The samples of one epoch after the other, with Streaming's own state by samples read."""

    def __init__(self, loader: Any, dataset: Any):
        self._loader = loader
        self._dataset = dataset
        self._base: dict[str, Any] = {}
        self._read = 0

    def __iter__(self) -> Iterator[Any]:
        # Not the subclass's own iteration, which takes the length of a sample for a batch's.
        batches = torch_data.DataLoader.__iter__(self._loader)
        # The dataset knows epoch and offset once it is being read.
        first = next(batches, [])
        self._base = self._dataset.state_dict(0, from_beginning=False)
        self._read = 0
        return self._each(first, batches)

    def _each(self, first: list[Any], batches: Iterator[list[Any]]) -> Iterator[Any]:
        for batch in itertools.chain([first], batches):
            for sample in batch:
                self._read += 1
                yield sample

    def state_dict(self) -> dict[str, Any]:
        world = self._dataset._parallel_rank_world
        read = self._base["sample_in_epoch"] + self._read * world.num_ranks
        return {**self._base, "sample_in_epoch": read}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        # A position of an epoch that this dataset has left already would be taken for outdated.
        self.start_epoch(state_dict["epoch"])
        self._dataset.load_state_dict(state_dict)

    def start_epoch(self, epoch: int) -> None:
        self._dataset.next_epoch = epoch
