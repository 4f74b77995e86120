"""The command line: help, JSON, and one clear line on bad input."""

import json

import pytest
from hotlane import make_scorer

import metagrad_filter as mgf
from metagrad_filter import cli
from metagrad_filter.doctor import installation


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "demo" in shown
    assert "inspect" in shown
    assert "doctor" in shown


@pytest.mark.parametrize("command", ["demo", "inspect", "doctor"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_inspect_reports_versions_ledgers_and_damage(tmp_path, capsys):
    registry = mgf.Registry(tmp_path)
    registry.publish(make_scorer(), {"round": 1})
    registry.publish(make_scorer(), {"round": 2})
    registry.reject(None, "unreliable", {"round": 3})
    mgf.Ledger(tmp_path, "default").decide(0, 1)
    payload = tmp_path / "registry" / "00000002.safetensors"
    payload.write_bytes(payload.read_bytes()[:-1])

    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["versions"][0]["state"] == "ok"
    assert found["versions"][1]["state"].startswith("refused")
    assert found["ledgers"]["default"][0]["version"] == 1
    assert found["rejected"][0]["reason"] == "unreliable"


def test_inspect_prints_tables_without_json(tmp_path, capsys):
    mgf.Registry(tmp_path).publish(make_scorer(), {"round": 1})
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "version" in capsys.readouterr().out


def test_inspect_of_another_directory_is_one_line_and_exit_2(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert "not a run directory" in shown.err


@pytest.mark.parametrize("seeds", ["0", "-1"])
def test_demo_refuses_bad_seeds(seeds, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), "--seeds", seeds]) == 2
    assert "seeds" in capsys.readouterr().err


def test_demo_never_removes_a_directory_it_did_not_make(tmp_path, capsys):
    precious = tmp_path / "run" / "precious"
    precious.parent.mkdir()
    precious.touch()
    assert cli.main(["demo", "--out", str(tmp_path), "--quick"]) == 1
    assert "not made by the demo" in capsys.readouterr().err
    assert precious.exists()


def test_doctor_reports_the_installation(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["passed"] and found["checks"] == []
    assert found["installation"]["versions"]["jax"]
    assert "metagrad-filter:" not in shown.err


def test_doctor_prints_tables_without_json(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "native scorer" in shown and "devices" in shown


def test_doctor_with_a_missing_package_fails_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(installation, "_PACKAGES", ("no-such-package-here",))
    assert cli.main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert not json.loads(shown.out)["passed"]
    lines = [line for line in shown.err.splitlines() if line.startswith("metagrad-filter:")]
    assert lines == [
        "metagrad-filter: no-such-package-here is not installed; reinstall metagrad-filter."
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setup", "nowhere"], "expected package.module:function"),
        (["--setup", "json:dumps"], "json:dumps raised TypeError"),
        (["--metagradients", "--subsets", "2"], "subsets=2"),
    ],
)
def test_doctor_refuses_bad_input_with_one_line(arguments, message, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert message in shown.err


def test_doctor_examines_the_users_own_model(capsys):
    assert cli.main(["doctor", "--setup", "doctor_setups:sound", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and len(found["checks"]) == 6
    assert {*found["checks"][0]} == {"name", "value", "expected", "passed", "detail"}


def test_doctor_names_what_fails_in_the_users_own_model(capsys):
    assert cli.main(["doctor", "--setup", "doctor_setups:diverging"]) == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("metagrad-filter:")]
    assert lines and "failed" in shown.out
