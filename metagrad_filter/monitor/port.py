"""A port on which Prometheus asks, opened and let go of."""

from __future__ import annotations

from typing import Any

from metagrad_filter.errors import ConfigError


class MetricsPort:
    """Answers `/metrics` over HTTP in a thread, from `open` until `close`."""

    def __init__(self) -> None:
        self._serving: Any = None

    @property
    def number(self) -> int | None:
        """The port that is served, None while it is closed."""
        return None if self._serving is None else self._serving[0].server_port

    def open(self, registry: Any, port: int, addr: str) -> int:
        """Starts to answer and returns the port.

        Args:
          registry: the prometheus_client registry whose metrics are the answer.
          port: 1 to 65535; 0 for any free one.
          addr: address to listen on.

        Raises:
          ConfigError: it is open already, or the port cannot be used.
        """
        # Imported late, for the package looks at PROMETHEUS_MULTIPROC_DIR when it is.
        from prometheus_client import start_http_server

        if self._serving is not None:
            raise ConfigError("metrics are served already; close before serving on another port.")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ConfigError(f"port is {port!r}, expected an int from 0 to 65535.")
        try:
            self._serving = start_http_server(port, addr, registry)
        except OSError as error:
            raise ConfigError(
                f"port {port} of {addr} cannot be used ({error}); choose another one."
            ) from error
        return self._serving[0].server_port

    def close(self) -> None:
        """Lets go of the port; a second call does nothing."""
        if self._serving is not None:
            server, thread = self._serving
            self._serving = None
            server.shutdown()
            server.server_close()
            thread.join()
