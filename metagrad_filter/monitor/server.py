"""The page in live mode: a small read-only server on the loopback interface.

    serve(run_dir)  ->  http://127.0.0.1:8377/

    /            the page        /view.json   what it shows        /events   pushed when it changes
    /metrics     of a callable that the caller gives, for Prometheus          /healthz   "ok"

Answers GET (and HEAD) only, reads the known files of one run and nothing that a request names, and
keeps nothing on disk. The run is read again only when the names or sizes of its files have changed,
once for all clients and never for more than a fifth of the time.

With examples, windows of the stream are on the page; a server that shows some listens on the
loopback interface only. `/metrics` and a port of its own answer Prometheus (`exporter.py`).

Input: a run directory, which may still be empty. Cost: one listing every two seconds while somebody
looks (30 s for a bucket). Needs the extra `monitor` (starlette and uvicorn). Read next: `view.py`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable
from typing import TYPE_CHECKING, Any

from metagrad_filter.calibration.validation import FILE as VALIDATION
from metagrad_filter.errors import ConfigError, MetagradFilterError
from metagrad_filter.ledger import FOLDER as LEDGERS
from metagrad_filter.ledger import is_name
from metagrad_filter.monitor.exporter import RunExporter
from metagrad_filter.monitor.page import examples_of, live_html, view_json
from metagrad_filter.monitor.records import ALARMS
from metagrad_filter.monitor.view import METRICS, ROUNDS, run_view
from metagrad_filter.registry import FOLDER as REGISTRY
from metagrad_filter.store import LocalStore, Store, is_key, open_store

if TYPE_CHECKING:
    from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]

DEFAULT_PORT = 8377

_LOCAL_POLL_SECONDS = 2.0
_REMOTE_POLL_SECONDS = 30.0
_HEARTBEAT_SECONDS = 15.0
# A client that went away without a word frees its place then; a browser connects again by itself.
_LIFETIME_SECONDS = 3600.0
_CLIENTS = 16
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


def make_app(
    run_dir: str | os.PathLike[str] | Store,
    *,
    metrics: Callable[[], bytes] | None = None,
    hosts: tuple[str, ...] = ("*",),
    clients: int = _CLIENTS,
    poll_seconds: float | None = None,
    heartbeat_seconds: float = _HEARTBEAT_SECONDS,
    lifetime_seconds: float = _LIFETIME_SECONDS,
    examples: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> Starlette:
    """Makes the application, for `serve` or for a server of one's own.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      metrics: returns what `/metrics` answers, in Prometheus' text format; None for 404.
      hosts: names that a request may address the server by; `("*",)` for any.
      clients: how many may listen to `/events` at a time; others are told 503.
      poll_seconds: between looks at the run; None for 2 s, or 30 s where it lies in a bucket.
      heartbeat_seconds: between comments on a silent `/events`.
      lifetime_seconds: after which `/events` ends, and a browser connects again.
      examples: as for `run_view`.

    Returns:
      An ASGI application.

    Raises:
      ConfigError: `run_dir` is no directory, a number is out of its domain, or starlette is not
        installed.
      OSError: the store cannot be reached.
    """
    if type(clients) is not int or clients < 1:
        raise ConfigError(f"clients is {clients!r}, expected an int of at least 1.")
    store = open_store(run_dir)
    if poll_seconds is None:
        poll_seconds = (
            _LOCAL_POLL_SECONDS if isinstance(store, LocalStore) else _REMOTE_POLL_SECONDS
        )
    for name, value in (
        ("poll_seconds", poll_seconds),
        ("heartbeat_seconds", heartbeat_seconds),
        ("lifetime_seconds", lifetime_seconds),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ConfigError(f"{name} is {value!r}, expected a positive number of seconds.")
    try:
        from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
        from starlette.concurrency import run_in_threadpool  # pyright: ignore[reportMissingImports]
        from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]
        from starlette.middleware.trustedhost import (  # pyright: ignore[reportMissingImports]
            TrustedHostMiddleware,
        )
        from starlette.requests import Request  # pyright: ignore[reportMissingImports]
        from starlette.responses import (  # pyright: ignore[reportMissingImports]
            HTMLResponse,
            PlainTextResponse,
            Response,
            StreamingResponse,
        )
        from starlette.routing import Route  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing(error) from error

    watch = _Watch(store, poll_seconds, examples)
    listening = 0

    def reply(kind: type[Response], content: Any, status: int = 200, **more: Any) -> Response:
        return kind(content, status, headers=_HEADERS, **more)

    async def page(request: Request) -> Response:
        await run_in_threadpool(watch.look)
        return reply(HTMLResponse, await run_in_threadpool(live_html, watch.view))

    async def view(request: Request) -> Response:
        await run_in_threadpool(watch.look)
        return reply(Response, watch.text, media_type="application/json")

    async def events(request: Request) -> Response:
        nonlocal listening
        if listening >= clients:
            return reply(PlainTextResponse, f"{clients} clients listen already; try later.\n", 503)
        return StreamingResponse(
            stream(), media_type="text/event-stream", headers=_HEADERS | {"X-Accel-Buffering": "no"}
        )

    async def stream() -> AsyncIterator[str]:
        nonlocal listening
        listening += 1
        try:
            began = spoken = time.monotonic()
            seen = told = -1
            while (now := time.monotonic()) - began < lifetime_seconds:
                await run_in_threadpool(watch.look)
                if watch.number != seen:
                    seen, spoken = watch.number, now
                    # JSON has no raw line breaks, so a view is one line of data.
                    yield f"id: {seen}\nevent: view\ndata: {watch.text}\n\n"
                elif watch.problem and watch.failures != told:
                    told, spoken = watch.failures, now
                    yield f"event: problem\ndata: {' '.join(watch.problem.split())}\n\n"
                elif now - spoken >= heartbeat_seconds:
                    spoken = now
                    yield ": still here\n\n"
                await asyncio.sleep(poll_seconds)
        finally:
            listening -= 1

    async def measured(request: Request) -> Response:
        if metrics is None:
            return reply(PlainTextResponse, "No metrics are exported here.\n", 404)
        content = await run_in_threadpool(metrics)
        return reply(Response, content, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def healthz(request: Request) -> Response:
        return reply(PlainTextResponse, "ok\n")

    ways = {
        "/": page,
        "/view.json": view,
        "/events": events,
        "/metrics": measured,
        "/healthz": healthz,
    }
    return Starlette(
        routes=[Route(path, answer, methods=["GET"]) for path, answer in ways.items()],
        # A page elsewhere that resolves its own name to this address does not get in.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def serve(
    run_dir: str | os.PathLike[str] | Store,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    *,
    metrics_port: int | None = None,
    examples: int = 0,
    tokenizer: str | os.PathLike[str] | None = None,
) -> None:
    """Serves the page until interrupted.

    The server has no passwords: on any other address than the loopback's, whoever reaches the port
    reads the run's numbers.

    Args:
      run_dir: a directory, a URL (see `open_store`), or a store.
      host: address to listen on.
      port: TCP port; 0 lets the system choose one.
      metrics_port: where Prometheus is answered as well, on `host`; 0 lets the system choose one,
        None leaves it to the page's own `/metrics`.
      examples, tokenizer: as for `write_run_report`; on the loopback interface only.

    Raises:
      ConfigError: an argument is out of its domain, examples are asked for on an address that
        others reach, or starlette or uvicorn is not installed.
      OSError: the port is taken, or the store cannot be reached.
    """
    if type(port) is not int or not 0 <= port < 65536:
        raise ConfigError(f"port is {port!r}, expected an int in [0, 65535].")
    if not isinstance(host, str) or not host:
        raise ConfigError(f"host is {host!r}, expected an address such as '127.0.0.1'.")
    if metrics_port is not None and (
        type(metrics_port) is not int or not 0 <= metrics_port < 2**16
    ):
        raise ConfigError(
            f"metrics_port is {metrics_port!r}, expected an int in [0, 65535] or None."
        )
    shown = examples_of(run_dir, examples, tokenizer)
    if shown is not None and not (_is_loopback(host) or host == "::1"):
        raise ConfigError(
            f"host is {host!r} and examples is {examples!r}: windows of the stream are shown on "
            "127.0.0.1 only, for there is no password; leave one of the two out."
        )
    try:
        import uvicorn  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing(error) from error
    exporter = RunExporter(run_dir)
    hosts = ("127.0.0.1", "localhost") if _is_loopback(host) else ("*",)
    app = make_app(run_dir, metrics=exporter.text, hosts=hosts, examples=shown)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1
    )
    # Binding here turns a taken port into an OSError in place of an exit.
    listener = _listener(host, port)
    name = f"[{host}]" if ":" in host else host
    with listener, exporter:
        print(f"http://{name}:{listener.getsockname()[1]}/", flush=True)
        if metrics_port is not None:
            print(f"http://{name}:{exporter.serve(metrics_port, host)}/metrics", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


class _Watch:
    """The newest view of a run, read again when the run has changed."""

    def __init__(self, store: Store, poll_seconds: float, examples: Any = None):
        self.number, self.failures, self.problem = 0, 0, ""
        self._store, self._poll, self._examples = store, poll_seconds, examples
        self._lock = threading.Lock()
        self._stamp: Hashable = None
        self._again = 0.0
        # Now and not with the first request: a wrong directory is the caller's error. The stamp is
        # taken before the run is read, so that nothing written meanwhile is missed.
        self._read(_stamp(store))

    def look(self) -> None:
        """Reads the run again if it is time to and something has changed."""
        # Whoever comes while another thread reads takes what is there.
        if time.monotonic() < self._again or not self._lock.acquire(blocking=False):
            return
        try:
            if isinstance(self._store, LocalStore) and not self._store.directory.is_dir():
                raise ConfigError(
                    f"{self._store.directory} is no longer there; the newest view is shown."
                )
            stamp = _stamp(self._store)
            if stamp != self._stamp:
                self._read(stamp)
            self.problem = ""
            self._again = max(self._again, time.monotonic() + self._poll / 2)
        except (OSError, MetagradFilterError) as error:
            self.problem, self.failures = str(error), self.failures + 1
            self._again = time.monotonic() + self._poll
        finally:
            self._lock.release()

    def _read(self, stamp: Hashable) -> None:
        began = time.monotonic()
        self.view = run_view(self._store, verify=False, examples=self._examples)
        self.text = view_json(self.view)
        self.number += 1
        self._stamp = stamp
        ended = time.monotonic()
        self._again = ended + 4 * (ended - began)


def _stamp(store: Store) -> Hashable:
    """Changes when a view may: the names of all files, and the sizes of those that grow."""
    folders = [REGISTRY, ROUNDS]
    for parent in (LEDGERS, METRICS):
        folders += [f"{parent}/{name}" for name in sorted(filter(is_name, store.names(parent)))]
    found: list[Hashable] = []
    for folder in folders:
        try:
            names = sorted(store.names(folder))
        except NotADirectoryError:
            continue
        found.append((folder, tuple(names)))
        if isinstance(store, LocalStore) and folder.startswith(METRICS):
            found.append(tuple(_size(store, f"{folder}/{n}") for n in names if is_key(n)))
    if isinstance(store, LocalStore):
        found += [_size(store, key) for key in (ALARMS, VALIDATION)]
    return tuple(found)


def _size(store: LocalStore, key: str) -> int:
    try:
        return os.stat(store.directory / key, follow_symlinks=False).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # From here on a client waits for the server to start and is not refused.
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"Cannot listen on {host} port {port}: {error.strerror}; name another port"
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        # Names in brackets defeat the host check, so an IPv6 loopback goes without it.
        return host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"The module {error.name!r} is not installed; the live page needs it. "
        "Run `pip install 'metagrad-filter[monitor]'`."
    )
