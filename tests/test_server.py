"""Server: GET only, known files only, pushes when the run changes, bounded, clear refusals."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from example_run import make_alarm, make_record, write_alarms, write_records
from hotlane import make_scorer, make_windows

import metagrad_filter as mgf
from metagrad_filter.errors import ConfigError
from metagrad_filter.labels import LabelStore, RoundLabels
from metagrad_filter.monitor.examples import Examples
from metagrad_filter.monitor.server import make_app, serve


@pytest.fixture
def client_of():
    """Makes clients of an application; skips where the extra `monitor` is not installed."""
    pytest.importorskip("starlette", reason="the live page needs metagrad-filter[monitor]")
    pytest.importorskip("httpx", reason="starlette's test client needs httpx")
    from starlette.testclient import TestClient  # pyright: ignore[reportMissingImports]

    return lambda run_dir, **fields: TestClient(make_app(run_dir, **fields))


RECORD = json.dumps(make_record(0, 0)).encode()
FAST = {"poll_seconds": 0.02, "lifetime_seconds": 0.5}


def test_the_page_its_view_and_health_are_answered(client_of, tmp_path):
    write_records(tmp_path, [make_record(i, 0) for i in range(3)])
    client = client_of(tmp_path)
    page = client.get("/")
    assert page.status_code == 200 and 'data-live="yes"' in page.text
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["x-content-type-options"] == "nosniff"
    view = client.get("/view.json")
    assert view.headers["content-type"] == "application/json"
    assert view.json()["filters"]["train"]["records"] == 3
    assert client.get("/healthz").text == "ok\n"


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete", "options"])
@pytest.mark.parametrize("path", ["/", "/view.json", "/events", "/metrics", "/healthz"])
def test_only_get_is_answered(client_of, tmp_path, method, path):
    assert getattr(client_of(tmp_path), method)(path).status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/registry/00000001.json", "/../secret", "/%2e%2e/secret", "/view.json/../secret", "/assets/"],
)
def test_no_path_reaches_a_file(client_of, tmp_path, path):
    run_dir = tmp_path / "run"
    mgf.Registry(run_dir).publish(make_scorer())
    (tmp_path / "secret").write_text("secret")
    answer = client_of(run_dir).get(path)
    assert answer.status_code == 404 and "secret" not in answer.text


def test_another_host_name_is_refused(client_of, tmp_path):
    client = client_of(tmp_path, hosts=("127.0.0.1", "localhost"))
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:8377"}).status_code == 200


def test_metrics_are_those_of_the_caller(client_of, tmp_path):
    assert client_of(tmp_path).get("/metrics").status_code == 404
    answer = client_of(tmp_path, metrics=lambda: b"metagrad_filter_keep_ratio 0.25\n").get(
        "/metrics"
    )
    assert answer.text == "metagrad_filter_keep_ratio 0.25\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_an_alarm_that_is_raised_is_pushed(client_of, tmp_path):
    write_records(tmp_path, [make_record(0, 0)])
    client = client_of(tmp_path, **FAST)
    assert client.get("/view.json").json()["filters"]["train"]["alarms"]["count"] == 0
    write_alarms(tmp_path, [make_alarm("psi", 7, "raised")])
    events = events_of(client.get("/events").text)
    standing = json.loads(events[-1][1])["filters"]["train"]["alarms"]["standing"]
    assert [alarm["kind"] for alarm in standing] == ["psi"]


def test_examples_are_on_the_page_only_where_they_are_asked_for(client_of, tmp_path):
    mgf.Registry(tmp_path).publish(make_scorer())
    labels = RoundLabels(make_windows(32), np.zeros((2, 32), np.float32))
    LabelStore(tmp_path).append(1, labels)
    assert client_of(tmp_path).get("/view.json").json()["examples"] is None
    found = client_of(tmp_path, examples=Examples(tmp_path, 2)).get("/view.json").json()
    assert len(found["examples"]["high"]) == 2


PROGRAM = """
import sys
from metagrad_filter.cli import main
sys.exit(main(["monitor", sys.argv[1], "--port", "0", "--metrics-port", "0"]))
"""


def test_the_command_answers_prometheus_on_a_port_of_its_own(tmp_path):
    pytest.importorskip("uvicorn", reason="the live page needs metagrad-filter[monitor]")
    pytest.importorskip("starlette", reason="the live page needs metagrad-filter[monitor]")
    write_records(tmp_path, [make_record(0, 0)])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        page, metrics = (process.stdout.readline().strip() for _ in range(2))
        for address in (metrics, page + "metrics"):
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert "metagrad_filter_windows_total" in answer.read().decode()
    finally:
        process.terminate()
        process.wait(20)


def events_of(text):
    """The (event, data) pairs and comments of a stream of server-sent events."""
    found = []
    for part in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in part.split("\n"))
        found.append((fields.get("event"), fields.get("data", fields.get(""))))
    return found


def test_a_new_view_is_pushed_when_the_run_changes_and_only_then(client_of, tmp_path):
    write_records(tmp_path, [make_record(0, 0)])
    client = client_of(tmp_path, **FAST)
    (only,) = events_of(client.get("/events").text)
    assert only[0] == "view" and json.loads(only[1])["filters"]["train"]["records"] == 1
    # A record appended to the same file, then a version, then a round.
    write_records(tmp_path, [make_record(0, 0), make_record(1, 0)])
    assert json.loads(events_of(client.get("/events").text)[-1][1])["filters"]["train"]["kept"]
    seen = client.get("/view.json").json()
    assert seen["filters"]["train"]["records"] == 2 and seen["versions"] == []
    mgf.Registry(tmp_path).publish(make_scorer())
    events = events_of(client.get("/events").text)
    assert len(json.loads(events[-1][1])["versions"]) == 1


def test_a_change_while_a_client_listens_reaches_it(client_of, tmp_path):
    client = client_of(tmp_path, poll_seconds=0.05, lifetime_seconds=1.5)
    timer = threading.Timer(0.4, lambda: mgf.Registry(tmp_path).publish(make_scorer()))
    timer.start()
    events = events_of(client.get("/events").text)
    timer.join()
    counts = [len(json.loads(data)["versions"]) for kind, data in events if kind == "view"]
    assert counts[0] == 0 and counts[-1] == 1


def test_a_run_in_a_bucket_is_followed_too(client_of):
    url = "memory://test-server"
    client = client_of(url, poll_seconds=1e-6)
    assert client.get("/view.json").json()["filters"] == {}
    store = mgf.Registry(url).store
    store.write_once("metrics/train/host-1-1800000000000000000-00000000.json", RECORD)
    # The view is never made for more than a fifth of the time.
    deadline = time.monotonic() + 20
    while not (found := client.get("/view.json").json()["filters"]):
        assert time.monotonic() < deadline
    assert found["train"]["records"] == 1


def test_a_silent_stream_has_a_heartbeat(client_of, tmp_path):
    client = client_of(tmp_path, heartbeat_seconds=0.1, **FAST)
    events = events_of(client.get("/events").text)
    assert events[0][0] == "view" and (None, "still here") in events[1:]


def test_a_run_that_disappears_is_said_once_and_the_last_view_stays(client_of, tmp_path):
    run_dir = tmp_path / "run"
    write_records(run_dir, [make_record(0, 0)])
    client = client_of(run_dir, **FAST)
    run_dir.rename(tmp_path / "elsewhere")
    events = events_of(client.get("/events").text)
    assert [kind for kind, _ in events[:2]] == ["view", "problem"]
    assert "is no longer there" in events[1][1]
    assert client.get("/view.json").json()["filters"]["train"]["records"] == 1


class Listener:
    """One request for `/events`, made of an application without a network in between."""

    def __init__(self, app):
        self.status = 0
        self._begun, self._gone = asyncio.Event(), asyncio.Event()
        path = {"path": "/events", "raw_path": b"/events", "query_string": b"", "root_path": ""}
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "headers": []} | path
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self):
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body":
            self._begun.set()

    async def answer(self):
        await asyncio.wait_for(self._begun.wait(), 10)
        return self.status

    async def leave(self):
        self._gone.set()
        await asyncio.wait_for(self._task, 10)


def test_listeners_beyond_the_limit_are_refused_until_one_leaves(client_of, tmp_path):
    app = client_of(tmp_path, clients=2, poll_seconds=0.02).app

    async def visit():
        first, second = Listener(app), Listener(app)
        found = [await first.answer(), await second.answer()]
        third = Listener(app)
        found.append(await third.answer())
        await first.leave()
        fourth = Listener(app)
        found.append(await fourth.answer())
        await asyncio.gather(second.leave(), fourth.leave())
        return found

    assert asyncio.run(visit()) == [200, 200, 503, 200]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "port is 70000, expected an int in"),
        ({"port": "80"}, "port is '80'"),
        ({"port": True}, "port is True"),
        ({"host": ""}, "host is ''"),
        ({"metrics_port": 65536}, "metrics_port is 65536"),
        ({"examples": 51}, "examples is 51"),
        ({"examples": 3, "host": "192.0.2.1"}, "shown on 127.0.0.1 only"),
        ({"tokenizer": "gpt2"}, "no examples are asked for"),
    ],
)
def test_bad_addresses_are_refused(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        serve(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clients": 0}, "clients is 0, expected an int of at least 1"),
        ({"poll_seconds": 0}, "poll_seconds is 0, expected a positive"),
        ({"heartbeat_seconds": float("nan")}, "heartbeat_seconds is nan"),
        ({"lifetime_seconds": "1"}, "lifetime_seconds is '1'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_app(tmp_path, **fields)


def test_a_path_that_is_no_run_directory_is_refused(client_of, tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        make_app(tmp_path / "nothing")


def test_a_taken_port_is_named(client_of, tmp_path):
    pytest.importorskip("uvicorn", reason="the live page needs metagrad-filter[monitor]")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"Cannot listen on 127.0.0.1 port {port}"):
            serve(tmp_path, port=port)


@pytest.mark.parametrize(
    ("module", "start"), [("starlette.applications", make_app), ("uvicorn", serve)]
)
def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch, module, start):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'metagrad-filter\[monitor\]'"):
        start(tmp_path)
