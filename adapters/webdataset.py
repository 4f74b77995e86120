"""The filter as a stage of a WebDataset pipeline, before samples are batched.

    stage = score_filter("run", keep_ratio=0.25, windows=TextWindows("tokens.npy"))
    ds = wds.WebDataset(urls).decode().compose(stage).batched(32)

Each worker filters the samples of its own shards and counts its own blocks, so the stream is
reproducible for a fixed assignment of shards. WebDataset has no checkpoints. Where its order is
fixed (no resampling, seeded shuffles), `stream.FilteredStream` over the pipeline before the stage
has a state, which resumes by reading and skipping the samples before the current block:

    stream = FilteredStream(lambda: iter(ds), configure("run", keep_ratio=0.25, windows=...))

Cost: a block of M samples is read ahead. Read next: `stream.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Unpack

from metagrad_filter.blocks import FilterConfig

from .options import Options, configure, framework
from .stream import FilteredStream

wds_utils = framework("webdataset.utils", "webdataset")


def score_filter(run_dir: str | os.PathLike[str], **options: Unpack[Options]) -> ScoreFilterStage:
    """Returns a stage for `WebDataset.compose` or `DataPipeline`.

    Args:
      run_dir: directory shared with the calibrator.
      options: see `options.Options`; the key of `windows` is a sample's extension.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
    """
    return ScoreFilterStage(configure(run_dir, **options))


class ScoreFilterStage:
    """Iterator to iterator; see `score_filter`."""

    def __init__(self, config: FilterConfig):
        config.bind()
        self._config = config

    def __call__(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yields the kept samples; raises `WindowError` for samples that are no windows."""
        _, world_size, _, num_workers = wds_utils.pytorch_worker_info()
        return FilteredStream(samples, self._config, may_be_empty=world_size * num_workers > 1)
