"""/metrics over HTTP on loopback, and over HTTPS for those who show a certificate anywhere else."""

import logging
import socket
import ssl
import sys
import threading
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.registry import Collector
from typing_extensions import override

from kfdist.rpc.servers import check_protected
from kfdist.system.addresses import is_loopback, join_address, socket_address, unbindable
from kfdist.system.credentials import Credentials, Reread

_LOG = logging.getLogger(__name__)

MAX_REQUESTS = 32
"""Connections at a time; further ones are closed at once."""

SECONDS = 10.0
"""How long one may be silent, in its handshake, too."""

LONGEST_SECONDS = 30.0
"""How long one may last, however much it says: who sends a byte now and then must not keep others out."""


class MetricsServer:
    """Serves a collector's metrics from threads.

    Attributes:
        address: Where it serves, "host:port" with the real port.
    """

    def __init__(self, collector: Collector, address: str, credentials: Credentials | None = None) -> None:
        """Binds and serves at once.

        Args:
            collector: What to serve.
            address: "host:port"; port 0 takes any free one. On loopback unless there are credentials.
            credentials: What others see and must match; loopback stays plain HTTP.

        Raises:
            ConfigError: The address is malformed, or not on loopback and not protected.
            EnvironmentFault: It is in use, or the certificate can't be used.
        """
        host, port = check_protected(address, credentials, path="control.metrics_address")
        registry = CollectorRegistry()
        registry.register(collector)
        context = None
        if credentials is not None and not is_loopback(host):
            own = credentials
            context = Reread(own.identity_files, lambda: own.tls(ssl.PROTOCOL_TLS_SERVER))
        try:
            self._server = _Server(host, port, MetricsHandler.factory(registry), context)
        except OSError:
            raise unbindable(host, port, path="control.metrics_address") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="kfdist-metrics", daemon=True)
        self._thread.start()
        self.address = join_address(host, self._server.server_address[1])

    def close(self) -> None:
        """Stops serving; takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, TCPServer):
    """A thread per request, with bounds; each connection's TLS is that of the files as they are then."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: Any, context: Reread[ssl.SSLContext] | None) -> None:
        self.address_family, own = socket_address(host, port)
        self._context = context
        self._room = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(own, handler)

    @override
    def get_request(self) -> tuple[Any, Any]:
        connection, peer = super().get_request()
        connection.settimeout(SECONDS)
        if self._context is not None:
            # The handshake is for the request's own thread: a silent peer must not keep the next ones waiting.
            connection = self._context.value.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    @override
    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._room.acquire(blocking=False)

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had
            self._room.release()
            raise

    @override
    def process_request_thread(self, request: Any, client_address: Any) -> None:
        ending = threading.Timer(LONGEST_SECONDS, _cut, [request])
        ending.daemon = True
        try:
            ending.start()
            super().process_request_thread(request, client_address)
        except RuntimeError:  # no thread is to be had: whom nothing would cut off isn't served
            self.handle_error(request, client_address)
            self.shutdown_request(request)
        finally:
            ending.cancel()
            self._room.release()

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.info("a request for metrics from %s failed: %s", client_address[0], sys.exc_info()[1])


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended meanwhile
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of TLS, too, whose own way waits for the reader
