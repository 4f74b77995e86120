"""Registry and ledger on S3, spoken to a local server: the shared suite, and what it asks for.

Needs moto[server], which the default run does not have.
"""

import itertools
import threading
import time
from typing import Any

import pytest

boto3 = pytest.importorskip("boto3")
threaded_moto_server = pytest.importorskip("moto.moto_server.threaded_moto_server")
import store_checks  # noqa: E402
from hotlane import make_scorer  # noqa: E402

import metagrad_filter as mgf  # noqa: E402
from metagrad_filter.kvstore import KvStore  # noqa: E402
from metagrad_filter.registry import Registry  # noqa: E402
from metagrad_filter.watch import Watcher  # noqa: E402

REGION = "us-east-1"
_numbers = itertools.count()


class Server:
    """A local S3 that records requests and can hold back uploads until two have come."""

    def __init__(self, monkeypatch):
        self.requests: list[tuple[str, str, str | None]] = []
        self.together: threading.Barrier | None = None
        self.forget_condition = False
        server, dispatcher = self, threaded_moto_server.DomainDispatcherApplication

        class Recording(dispatcher):
            def __call__(self, environ: dict[str, Any], start):
                method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
                server.requests.append((method, path, environ.get("HTTP_IF_NONE_MATCH")))
                if method == "PUT" and server.together is not None:
                    server.together.wait(30)
                if method == "PUT" and server.forget_condition:
                    environ.pop("HTTP_IF_NONE_MATCH", None)
                return super().__call__(environ, start)

        monkeypatch.setattr(threaded_moto_server, "DomainDispatcherApplication", Recording)
        self._server = threaded_moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"

    def bucket(self) -> str:
        name = f"bucket-{next(_numbers)}"
        boto3.client("s3", endpoint_url=self.endpoint, region_name=REGION).create_bucket(
            Bucket=name
        )
        return name

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        running = Server(patch)
        patch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running
        running.stop()


@pytest.fixture
def url(server):
    return f"s3://{server.bucket()}/runs/a run"


@pytest.mark.parametrize("check", store_checks.CHECKS, ids=lambda check: check.__name__)
def test_every_store(check, url):
    check(lambda: KvStore(url))


def test_a_write_carries_its_condition(server, url):
    server.requests.clear()
    assert KvStore(url).write_once("a/x", b"1")
    uploads = [r for r in server.requests if r[0] == "PUT"]
    assert [condition for _, _, condition in uploads] == ["*"]


def simultaneous(server, url) -> tuple[list[bool], bytes]:
    """Two writers of one key, whose uploads reach the server only when both have asked."""
    server.together = threading.Barrier(2)
    try:
        wins = [False, False]

        def write(worker: int) -> None:
            wins[worker] = KvStore(url).write_once("a/x", b"ab"[worker : worker + 1])

        store_checks.in_threads(write, 2)
    finally:
        server.together = None
    return wins, KvStore(url).read("a/x", 10)


def test_of_two_simultaneous_writers_one_wins(server, url):
    for n in range(10):
        wins, stored = simultaneous(server, f"{url}/{n}")
        assert sum(wins) == 1 and stored == b"ab"[wins.index(True) :][:1]


def test_a_server_that_ignores_conditions_lets_the_later_writer_win(server, url):
    server.forget_condition = True
    try:
        for n in range(10):
            wins, stored = simultaneous(server, f"{url}/{n}")
            # Reading back tells the other one, unless it reads before it is overwritten.
            assert wins[b"ab".index(stored)]
            assert KvStore(f"{url}/{n}").write_once("a/x", b"later") is False
    finally:
        server.forget_condition = False


def test_a_bucket_that_is_not_there_is_an_error(server):
    registry = Registry("s3://no-such-bucket/run")
    with pytest.raises(OSError, match="no-such-bucket"):
        registry.versions()
    with pytest.raises(mgf.PublishFailed, match="no-such-bucket"):
        registry.publish(make_scorer())


def test_a_watcher_sees_new_versions(url):
    publisher = Registry(url)
    publisher.publish(make_scorer(0))
    watcher = Watcher(Registry(url), interval=0.01, timeout=60)
    found = watcher.newest()
    assert found is not None and found.version == 1
    publisher.publish(make_scorer(1))
    for _ in range(3000):
        found = watcher.newest()
        if found is not None and found.version == 2:
            break
        time.sleep(0.01)
    assert found is not None and found.version == 2
    watcher.close()
