"""Decisions are made once: first writer wins, everybody else reads, nothing changes later.

What holds for every store is in `store_checks.py`.
"""

import pytest

from metagrad_filter.errors import ConfigError, StateMismatch
from metagrad_filter.ledger import Ledger


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "../x", "a/b", "a.b", "a" * 65, "ä", "a\n", "a\0", 3, None]
)
def test_names_that_could_leave_the_directory_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        Ledger(tmp_path, name)


@pytest.mark.parametrize("bad", [(-1, 0), (0, -1), (True, 0), (0, "1"), (0.0, 1)])
def test_decisions_out_of_range_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError):
        Ledger(tmp_path).decide(*bad)
    assert Ledger(tmp_path).entries() == {}


def test_every_damage_to_an_entry_is_noticed_or_contradicts_its_manifest(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.decide(4, 5, "0" * 64)
    path = tmp_path / "ledger" / "default" / "00000004.json"
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(StateMismatch, match="damaged"):
            ledger.read(4)
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            entry = ledger.read(4)
        except StateMismatch:
            continue
        # What still parses names another version or hash: the filter refuses to load that pair.
        assert entry is not None and entry.interval == 4
        assert (entry.version, entry.manifest_sha256) != (5, "0" * 64)


def test_a_fork_copies_decisions_up_to_an_interval(tmp_path):
    ledger = Ledger(tmp_path, "a")
    for interval in range(5):
        ledger.decide(interval, interval)
    fork = ledger.fork("b", up_to=2)
    assert list(fork.entries()) == [0, 1, 2]
    assert fork.decide(3, 9) == 9
    with pytest.raises(StateMismatch, match="interval 3"):
        ledger.fork("b")
    assert list(ledger.fork("c").entries()) == [0, 1, 2, 3, 4]


def test_another_configuration_under_the_same_name_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.bind({"seed": 0, "keep_ratio": "1/4"})
    ledger.bind({"keep_ratio": "1/4", "seed": 0})
    with pytest.raises(StateMismatch) as error:
        ledger.bind({"seed": 0, "keep_ratio": "1/2"})
    for part in ("keep_ratio", "1/4", "1/2", "name="):
        assert part in str(error.value)
    (tmp_path / "ledger" / "default" / "filter.json").write_bytes(b"{")
    with pytest.raises(StateMismatch, match="damaged"):
        ledger.bind({"seed": 0})
