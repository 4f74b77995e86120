"""Text adapter: windows have one length, come from one document each, and lose nothing silently."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from metagrad_filter.adapters.text import cut_windows, train_tokenizer  # pyright: ignore[reportMissingImports]
from metagrad_filter.errors import ConfigError, WindowError

DOCUMENTS = [
    "Serum calcium was measured in forty patients before and after treatment.",
    "The minister said that the budget would be presented in March.",
    "Short.",
    "Übergröße, naïve café: bytes beyond ASCII survive the round trip.",
] * 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=320)


def test_the_same_documents_give_the_same_tokenizer(tokenizer):
    assert train_tokenizer(iter(DOCUMENTS), vocab_size=320).to_str() == tokenizer.to_str()
    assert 256 < tokenizer.get_vocab_size() <= 320


def test_windows_are_the_whole_windows_of_each_document_in_order(tokenizer):
    length = 5
    windows, source = cut_windows(DOCUMENTS, tokenizer, length=length)
    assert windows.dtype == np.int32 and source.dtype == np.int32
    for i, text in enumerate(DOCUMENTS):
        ids = tokenizer.encode(text).ids
        whole = len(ids) // length * length
        assert windows[source == i].ravel().tolist() == ids[:whole]
    assert (np.diff(source) >= 0).all()


def test_decoding_windows_gives_the_text_back(tokenizer):
    windows, source = cut_windows(DOCUMENTS[3:4], tokenizer, length=2)
    text = tokenizer.decode(windows.ravel().tolist())
    assert DOCUMENTS[3].startswith(text.strip())
    assert len(text) >= len(DOCUMENTS[3]) - 8
    assert (source == 0).all()


def test_documents_in_many_batches_keep_their_index(tokenizer):
    documents = (f"document number {i}" for i in range(2500))
    windows, source = cut_windows(documents, tokenizer, length=3)
    assert len(windows) == len(source)
    assert set(source) == set(range(2500))


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_length_without_a_prediction_is_refused(tokenizer, length):
    with pytest.raises(ConfigError, match="at least 2"):
        cut_windows(DOCUMENTS, tokenizer, length=length)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no document"),
        (["", "a"], "None of the 2 documents"),
        ("one string", "Wrap it in a list"),
        (["text", b"bytes"], "Document 1 is bytes"),
    ],
)
def test_unusable_documents_are_refused(tokenizer, documents, message):
    with pytest.raises(WindowError, match=message):
        cut_windows(documents, tokenizer, length=50)


@pytest.mark.parametrize(
    ("documents", "size", "error"),
    [([], 300, WindowError), (["text"], 255, ConfigError), ("text", 300, WindowError)],
)
def test_unusable_training_input_is_refused(documents, size, error):
    with pytest.raises(error):
        train_tokenizer(documents, vocab_size=size)


def test_the_adapter_does_not_import_jax():
    code = "import sys, metagrad_filter.adapters.text; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
