"""HTTP/1.1 connections with limits that uvicorn does not have, against clients that open connections and send nothing.

uvicorn closes a connection that is idle after a response, but not one on which no request, or only a part of one, has arrived,
and it accepts headers of any length. Every connection uses a file descriptor, so a single client could block the server.
"""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.limits import HEAD_SECONDS, MAX_CONNECTIONS, MAX_HEAD_BYTES

log = logging.getLogger(__name__)


class LimitedConnection(HttpToolsProtocol):
    """A connection on which request line and headers must be complete within `head_seconds` and `max_head_bytes`.

    If there are too many, a new connection closes the one that has waited longest for a request, so that idle connections
    cannot block clients that send requests.
    """

    head_seconds: float = HEAD_SECONDS
    max_head_bytes: int = MAX_HEAD_BYTES
    max_connections: int = MAX_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = False
        self._waiting_since = self.loop.time()
        if len(self.connections) > self.max_connections and not self._close_longest_waiting():
            self._end(503, "Too many connections are open. Try again in a moment")
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head_timer is None and self._waits_for_a_request():
            self._start_head_timer()
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self._end(431, f"The request's head is larger than {self.max_head_bytes:,} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        names = [name for name, _ in self.headers]
        if b"transfer-encoding" in names and b"content-length" in names:  # a proxy may use the other one (request smuggling)
            raise ValueError("a request has either a Content-Length or a Transfer-Encoding, not both")  # uvicorn answers 400
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waiting_since = self.loop.time()
        if self._in_head:  # the next (pipelined) request had begun before this response was sent
            self._start_head_timer()

    def _close_longest_waiting(self) -> bool:
        """Close the other connection that has waited longest for a request; return False if all are in use."""
        others = (one for one in self.connections if isinstance(one, LimitedConnection) and one is not self)
        waiting = [one for one in others if one._waits_for_a_request() and not one.transport.is_closing()]
        if not waiting:
            return False
        min(waiting, key=lambda one: one._waiting_since).transport.close()
        return True

    def _waits_for_a_request(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_took_too_long)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_took_too_long(self) -> None:
        self._head_timer = None
        self._end(408, "No complete request arrived in time")

    def _end(self, status: int, sentence: str) -> None:
        """Respond in plain text and close the connection; there is no complete request for a problem document."""
        if self.transport.is_closing():
            return
        body = f"{sentence}\n".encode()
        head = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
