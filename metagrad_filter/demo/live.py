"""Training on the live, filtered stream: what the demos of both kinds of windows share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import numpy as np

from metagrad_filter.transform import score_filter
from metagrad_filter.windows import Windows


class LiveArm:
    """An arm on the filtered stream, half of it at a time.

    Args:
      arm: what is trained; its `train` takes `(n, B, ...)` batches, n steps.
      batches: of the filter's annotated elements, with their "class".
      half: training steps of half a stream.
      key: the entry of a batch that holds its windows.
      evaluate_every: steps that are trained at once.
    """

    def __init__(
        self,
        arm: Any,
        batches: Iterator[dict[str, np.ndarray]],
        half: int,
        *,
        key: str,
        evaluate_every: int,
    ):
        self.arm, self._batches, self._half = arm, batches, half
        self._key, self._every = key, evaluate_every
        self._classes: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []

    def train_half(self) -> None:
        """Trains on the next half of the stream."""
        left = self._half
        while left:
            taken = list(islice(self._batches, min(self._every, left)))
            self.arm.train(np.stack([batch[self._key] for batch in taken]))
            self._classes += [batch["class"] for batch in taken]
            self._versions += [batch["scorer_version"] for batch in taken]
            left -= len(taken)

    @property
    def classes(self) -> np.ndarray:
        """`(n,)` class of each window trained on."""
        return np.concatenate(self._classes)

    @property
    def versions(self) -> np.ndarray:
        """`(n,)` version that chose each of them."""
        return np.concatenate(self._versions)


def filtered_batches(
    source: Any, windows: Windows, run_dir: Path, config: Any, *, name: str
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the filtered stream: a real grain pipeline with the product's filter in it.

    The scorer version may change at half of the stream. The pipeline reads no further ahead than
    the block it is filtering, so the version is decided when training reaches it.
    """
    ds = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    )
    ds = score_filter(
        ds,
        run_dir,
        keep_ratio=config.keep_ratio,
        windows=windows,
        block_windows=config.block_windows,
        swap_every_blocks=config.blocks // 2,
        seed=config.seed,
        name=name,
        annotate=True,
    )
    return iter(ds.batch(config.batch_windows))
