"""The filter behind `tf.data`: a `tf.data.Dataset` comes back, or an iterator with a state.

    ds = score_filter(ds, "run", keep_ratio=0.25, windows=TextWindows("tokens")).batch(32)
    windows = stream(ds, "run", keep_ratio=0.25, windows=TextWindows("tokens"))

`score_filter` reads the dataset as numpy and hands kept elements back with the same `element_spec`,
before `batch`. TensorFlow does not save the position of a Python generator, so a `tf.train`
checkpoint of an iterator over it starts over; `stream` gives numpy elements and has `state_dict`
and `load_state_dict`, which resume by `Dataset.skip`. That is exact where the order is: seed
shuffles, and leave `deterministic` on. A new pass replays the scorer versions of the first; put
`repeat` before the filter for a stream that goes on learning.

An error inside a `tf.data.Dataset` reaches the caller as TensorFlow's own exception type, with this
package's error and its sentence in the message; `stream` raises it as it is.

Cost: elements leave and enter TensorFlow once. Read next: `stream.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Unpack

from metagrad_filter.errors import ConfigError
from metagrad_filter.selection import kept_before

from .options import Options, configure, framework
from .stream import FilteredStream

tf = framework("tensorflow", "tfdata")


def score_filter(dataset: Any, run_dir: str | os.PathLike[str], **options: Unpack[Options]) -> Any:
    """Keeps the elements of a `tf.data.Dataset` that the published scorers rank highest.

    Args:
      dataset: a `tf.data.Dataset`; elements hold one window each.
      run_dir: directory shared with the calibrator.
      options: see `options.Options`.

    Returns:
      A `tf.data.Dataset` of the same element spec; with `annotate=True` it also has `score`
      (float32) and `scorer_version` (int64). Its cardinality is exact where the source's is known.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
    """
    config = configure(run_dir, **options)
    spec = _checked(dataset).element_spec
    if config.annotate:
        if not isinstance(spec, dict):
            raise ConfigError(
                f"annotate=True needs dict elements, the element_spec is {spec}; map elements to "
                "dicts before the filter, or leave annotate=False."
            )
        spec = {
            **spec,
            "score": tf.TensorSpec((), tf.float32),
            "scorer_version": tf.TensorSpec((), tf.int64),
        }
    config.bind()
    kept = tf.data.Dataset.from_generator(
        lambda: FilteredStream(_Elements(dataset), config), output_signature=spec
    )
    n = int(dataset.cardinality())
    if n > 0:
        known = tf.data.experimental.assert_cardinality(kept_before(n, config.keep_ratio))
        kept = kept.apply(known)
    return kept


def stream(
    dataset: Any, run_dir: str | os.PathLike[str], **options: Unpack[Options]
) -> FilteredStream:
    """Returns an iterator of the kept elements as numpy, which saves and resumes its position.

    Args:
      dataset: a `tf.data.Dataset`; elements hold one window each.
      run_dir: directory shared with the calibrator.
      options: see `options.Options`.

    Raises:
      ConfigError: an argument is out of its domain, or `run_dir` cannot be written.
      StateMismatch: the filter's name was used in `run_dir` with another configuration.
    """
    return FilteredStream(_Elements(_checked(dataset)), configure(run_dir, **options))


def _checked(dataset: Any) -> Any:
    if not isinstance(dataset, tf.data.Dataset):
        raise ConfigError(
            f"dataset is a {type(dataset).__name__}, expected a tf.data.Dataset; an iterator of "
            "numpy elements goes to metagrad_filter.adapters.stream."
        )
    return dataset


class _Elements:
    """A dataset as numpy, read from any position on."""

    def __init__(self, dataset: Any):
        self._dataset = dataset
        self._position = 0

    def __iter__(self) -> Iterator[Any]:
        for element in self._dataset.skip(self._position).as_numpy_iterator():
            self._position += 1
            yield element

    def state_dict(self) -> dict[str, int]:
        return {"windows_seen": self._position}

    def load_state_dict(self, state_dict: dict[str, int], /) -> None:
        self._position = int(state_dict["windows_seen"])
