"""Token ids as text that is safe to show: any tokenizer's, without a network.

    decode = load_decoder("tokenizer.json")        decode = load_decoder("gpt2")
    decode(np.array([464, 3290]))                  # "The dog"

A file is read by `tokenizers`. A name is looked up among what the machine has downloaded already;
nothing is fetched, and no code of a repository runs. `visible` makes what would change the look of
a page (control characters, direction overrides) into characters that show themselves.

Cost: milliseconds for a file; a name whose `tokenizer.json` is not cached imports transformers.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metagrad_filter.errors import ConfigError

Decoder = Callable[[np.ndarray], str]

_MAX_FILE_BYTES = 256 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# Cc controls, Cf format characters (direction, joiners, byte order mark), Zl and Zp line breaks,
# Co private, Cs surrogates, Cn unassigned. A line feed and a tab stay what they are, and so do the
# joiners that some scripts are spelt with.
_HIDDEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Co", "Cs", "Cn"})
_PLAIN = frozenset("\n\t\u200c\u200d")


def load_decoder(tokenizer: str | os.PathLike[str]) -> Decoder:
    """Returns a function from `(T,)` token ids to text.

    Args:
      tokenizer: a `tokenizer.json`, a folder that holds one, or the name of a model whose tokenizer
        is in the machine's cache.

    Raises:
      ConfigError: it is none of these, or cannot be read.
    """
    named = os.fspath(tokenizer)
    path = Path(named)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return _from_file(path)
    if path.suffix == ".json" or not _NAME.fullmatch(named):
        raise ConfigError(
            f"tokenizer is {named!r}, which is no file; name a tokenizer.json, a folder that holds "
            "one, or a model whose tokenizer is in this machine's cache."
        )
    return _from_cache(named)


def visible(text: str, most: int) -> str:
    """Returns text whose every character shows, cut to `most` characters.

    Example:
      >>> visible("a\\x00b\\u202ec", 80)
      'a\u27e80000\u27e9b\u27e8202E\u27e9c'
    """
    shown = []
    for character in text[: most + 1]:
        hidden = character not in _PLAIN and unicodedata.category(character) in _HIDDEN
        shown.append(f"\u27e8{ord(character):04X}\u27e9" if hidden else character)
    whole = "".join(shown[:most])
    return whole if len(text) <= most else whole + "\u2026"


def ids_text(window: np.ndarray, most: int) -> str:
    """Returns up to `most` ids of a window as text, for want of a tokenizer."""
    shown = " ".join(map(str, window[:most].tolist()))
    return shown if len(window) <= most else f"{shown} \u2026"


def _from_file(path: Path) -> Decoder:
    from tokenizers import Tokenizer

    size = path.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ConfigError(
            f"tokenizer {path} has {size} bytes, expected at most {_MAX_FILE_BYTES}; name a "
            "tokenizer.json."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # tokenizers raises plain Exception for anything that it cannot read.
    except Exception as error:
        raise ConfigError(
            f"tokenizer {path} cannot be read ({error}); expected a tokenizer.json as the "
            "tokenizers package writes it."
        ) from error
    return lambda ids: tokenizer.decode(_known(ids), skip_special_tokens=False)


def _from_cache(name: str) -> Decoder:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "tokenizer.json")
    if isinstance(found, str):
        return _from_file(Path(found))
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"tokenizer {name!r} is not in this machine's cache ({reason}); download it first, or "
            "name its tokenizer.json."
        ) from error
    return lambda ids: tokenizer.decode(_known(ids))


def _known(ids: np.ndarray) -> list[int]:
    # Padding may be negative, which tokenizers takes for an overflow.
    return [i for i in ids.tolist() if i >= 0]
