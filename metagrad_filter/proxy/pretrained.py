"""Pretrained decoders from safetensors and GGUF files, and back to safetensors.

Answers "how does a real model become a proxy?": `load_pretrained` reads a folder, a model of the
Hugging Face hub or a `.gguf` file into the parameters and the loss that calibration takes;
`save_pretrained` writes a folder that `transformers` loads. Nothing that is read can run: weights
come from safetensors or GGUF only, never from a pickle, and no code of a repository is executed.
Cost: the download, then about a second for each gigabyte. torch is not imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.files import replace_file
from metagrad_filter.proxy.families import read_config, write_config
from metagrad_filter.proxy.loss import AnyConfig, DecoderLoss
from metagrad_filter.proxy.tensors import assemble, named_tensors
from metagrad_filter.types import PyTree

_JSON_BYTES = 16 << 20  # an index of a thousand layers is below 1 MB
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A decoder as it was read.

    Attributes:
      loss: `loss(params, windows) -> (B,)`; a frozen value that hashes.
      params: nested dict of arrays, as `init_decoder` makes it.
      config: that of `loss`.
    """

    loss: DecoderLoss
    params: PyTree
    config: AnyConfig


def load_pretrained(
    source: str | os.PathLike[str], *, revision: str | None = None, dtype: str = "float32"
) -> Pretrained:
    """Reads a decoder of the GPT-2 or the Llama family.

    Args:
      source: a folder with `config.json` and `model.safetensors` (or shards with
        `model.safetensors.index.json`), a `.gguf` file of the Llama family, or the id of a model
        on the Hugging Face hub. A folder that exists is never taken for an id.
      revision: commit, tag or branch on the hub; a commit makes a run repeatable.
      dtype: of the parameters, "float32" or "bfloat16". For the dtype that is computed in, see
        the field `dtype` of the configuration.

    Returns:
      The decoder. It computes in float32 and keeps all activations; for less memory replace its
      loss, for instance by `DecoderLoss(replace(config, remat=True, dtype="bfloat16"))`.

    Raises:
      ConfigError: the source is none of these, its family or one of its configuration keys is not
        implemented, or an argument is out of its domain.
      DataError: a file is missing, damaged or does not belong to its configuration.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        from metagrad_filter.proxy.gguf import read_gguf

        _no_revision(revision, path)
        config, params = read_gguf(path, dtype=dtype)
        return Pretrained(DecoderLoss(config), params, config)
    if os.fspath(source) and path.is_dir():  # Path("") is the current folder
        _no_revision(revision, path)
    elif isinstance(source, str) and _HUB_ID.fullmatch(source):
        path = _download(source, revision)
    else:
        raise ConfigError(
            f"source={os.fspath(source)!r} is not a folder that exists, a .gguf file or an id of "
            "the form 'owner/name'; correct the path."
        )
    config = read_config(_read_json(path / _CONFIG), where=str(path / _CONFIG))
    with contextlib.ExitStack() as stack:
        names, read = _open_tensors(path, stack)
        params = assemble(config, names, read, dtype=dtype, where=str(path))
    return Pretrained(DecoderLoss(config), params, config)


def save_pretrained(
    folder: str | os.PathLike[str], loss_or_config: DecoderLoss | AnyConfig, params: PyTree
) -> None:
    """Writes `config.json` and `model.safetensors`, which `transformers` and we load.

    Tensors keep their values and dtype bit for bit. Token ids and dropout rates of a checkpoint
    that the parameters may have come from are not known here: write its tokenizer beside them.

    Args:
      folder: made if it does not exist; both files are replaced, each as a whole.
      loss_or_config: what the parameters belong to.
      params: nested dict of arrays, all of one dtype.

    Raises:
      ConfigError: the parameters do not belong to the configuration, or differ in dtype.
      OSError: the folder cannot be written.
    """
    config = loss_or_config.config if isinstance(loss_or_config, DecoderLoss) else loss_or_config
    tensors = named_tensors(config, params)
    dtypes = sorted({value.dtype.name for value in jax.tree.leaves(params)})
    if len(dtypes) != 1:
        raise ConfigError(f"params are of types {dtypes}; expected one. Cast them first.")
    values = write_config(config, dtype=dtypes[0])
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_WEIGHTS}.{os.getpid()}-{secrets.token_hex(8)}"
    try:
        # transformers reads files of the format "pt" only.
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
        temporary.replace(folder / _WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    replace_file(folder / _CONFIG, text.encode(), mode=0o644)


def _open_tensors(
    folder: Path, stack: contextlib.ExitStack
) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """Names in a folder's safetensors files, and how to read one."""
    if (folder / _WEIGHTS).is_file():
        files = {_WEIGHTS: None}
    elif (folder / _INDEX).is_file():
        files = _shards(folder)
    else:
        raise DataError(
            f"{folder} holds neither {_WEIGHTS} nor {_INDEX}. Weights in pickles (.bin, .pt) are "
            "not read, because reading one can run code: convert them to safetensors first."
        )
    where: dict[str, Any] = {}
    for file, expected in files.items():
        with _reading(folder / file):
            handle = stack.enter_context(safetensors.safe_open(folder / file, framework="numpy"))
            names = list(handle.keys())
        if expected is not None and expected != set(names):
            odd = sorted(expected ^ set(names))[0]
            raise DataError(
                f"{folder / file} and {_INDEX} disagree on tensor {odd!r}; get both anew."
            )
        where |= dict.fromkeys(names, (folder / file, handle))

    def read(name: str) -> np.ndarray:
        path, handle = where[name]
        with _reading(path):
            return handle.get_tensor(name)

    return list(where), read


def _shards(folder: Path) -> dict[str, set[str]]:
    """File name -> names of its tensors, as the index says."""
    content = _read_json(folder / _INDEX)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise DataError(f"{folder / _INDEX} holds no weight_map; get it anew.")
    files: dict[str, set[str]] = {}
    for tensor, file in table.items():
        # A name from inside a file must not lead out of its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise DataError(
                f"{folder / _INDEX} places {tensor!r} in {file!r}; expected the name of a "
                "safetensors file in the same folder."
            )
        files.setdefault(file, set()).add(tensor)
    return files


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as safetensors ({error}). Get it anew.") from error


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"more than {_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Get it anew.") from error


def _no_revision(revision: str | None, path: Path) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r} was given with the local source {path}; a revision names a "
            "state of a hub repository. Leave it out."
        )


def _download(source: str, revision: str | None) -> Path:
    """The folder of one snapshot in the hub's cache; configuration and safetensors only."""
    import huggingface_hub  # what transformers itself downloads with
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [_CONFIG, _WEIGHTS, _INDEX, "model-*.safetensors"]
    try:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{source!r} (revision {revision or 'main'}) is not a folder here, and the Hugging "
            f"Face hub did not give it ({type(error).__name__}: {error}). Check the name and the "
            "network, or pass a folder."
        ) from error
