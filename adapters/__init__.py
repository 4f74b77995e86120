"""Loader adapters: how windows reach the filter from each kind of data and loader.

    import metagrad_filter as mgf
    windows = mgf.TextWindows("tokens")
    ds = mgf.adapters.torch.score_filter(ds, "run", keep_ratio=0.25, windows=windows)

Each module is imported when it is first used, and only then needs its framework; a missing one is a
`ConfigError`. All make the same choices (`metagrad_filter.blocks`) and take the same keywords
(`options.Options`); grain's filter is `metagrad_filter.transform`.

    stream       any iterable: what the others are thin shells over
    sequence     any sequence, by index
    options      the keywords; `configure` makes a configuration for `stream` and `sequence`
    torch        map-style and iterable datasets; DataLoader and StatefulDataLoader
    huggingface  datasets.Dataset and datasets.IterableDataset
    streaming    StreamingDataLoader of MosaicML Streaming
    webdataset   a pipeline stage
    tfdata       tf.data.Dataset
    text         documents to windows, before any of these
    timeseries   multivariate series of any source to windows, before any of these
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = (
    "huggingface",
    "options",
    "sequence",
    "stream",
    "streaming",
    "text",
    "tfdata",
    "timeseries",
    "torch",
    "webdataset",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
