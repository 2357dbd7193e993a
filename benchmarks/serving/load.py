"""A closed-loop load generator that costs little: every connection sends its next request when it has the answer to the last.

One thread and one selector, requests prepared as bytes, answers parsed just far enough. Run as a process of its own, so that its
work is not the server's: ``python load.py URL FILE CONNECTIONS SECONDS`` prints one JSON document.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

BOUNDARY = b"benchmark"


class Connection:
    """One client: what it still has to send, what it has received of the present answer, and when it began."""

    def __init__(self, address: tuple[str, int], request: bytes, selector: selectors.BaseSelector) -> None:
        self.address, self.request, self.selector = address, request, selector
        self.open()

    def open(self) -> None:
        self.socket = socket.create_connection(self.address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.selector.register(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)
        self.begin()

    def begin(self) -> None:
        self.sent, self.answer, self.began = 0, b"", time.perf_counter()
        self.selector.modify(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def write(self) -> None:
        self.sent += self.socket.send(memoryview(self.request)[self.sent :])
        if self.sent == len(self.request):
            self.selector.modify(self.socket, selectors.EVENT_READ, self)

    def read(self) -> int | None:
        """Return the status of a complete answer; 0 when the server closed the connection; None to go on."""
        chunk = self.socket.recv(65536)
        if not chunk:
            self.reopen()
            return 0
        self.answer += chunk
        head, end, body = self.answer.partition(b"\r\n\r\n")
        if not end:
            return None
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if len(body) < int(fields[b"content-length"]):
            return None
        status = int(head[9:12])
        if fields.get(b"connection") == b"close" or self.sent < len(self.request):
            self.reopen()
        return status

    def reopen(self) -> None:
        self.selector.unregister(self.socket)
        self.socket.close()
        self.open()


def prepared(url: str, image: bytes) -> bytes:
    """A multipart POST of the image, as curl -F sends it."""
    parts = urlsplit(url)
    part = b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    body = b"--" + BOUNDARY + b"\r\n" + part + image + b"\r\n--" + BOUNDARY + b"--\r\n"
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def run(url: str, image: bytes, connections: int, seconds: float, warm_up: float = 1.0) -> dict[str, object]:
    """Load the server and return rates and latencies, without those of the warm-up."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    selector = selectors.DefaultSelector()
    request = prepared(url, image)
    for _ in range(connections):
        Connection(address, request, selector)
    begun = time.perf_counter() + warm_up
    end = begun + seconds
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    while (now := time.perf_counter()) < end:
        for key, events in selector.select(timeout=0.1):
            connection: Connection = key.data
            if events & selectors.EVENT_WRITE and connection.sent < len(connection.request):
                connection.write()
            if events & selectors.EVENT_READ:
                status = connection.read()
                if status is not None:
                    now = time.perf_counter()
                    if now > begun:
                        statuses[status] += 1
                        if status == 200:
                            latencies.append(now - connection.began)
                    if status != 0 and connection.sent == len(connection.request):
                        connection.begin()
    latencies.sort()

    def quantile(share: float) -> float | None:
        return round(1000 * latencies[min(len(latencies) - 1, int(share * len(latencies)))], 2) if latencies else None

    return {
        "connections": connections,
        "answers_per_second": round(statuses[200] / seconds, 1),
        "refused_per_second": round((statuses.total() - statuses[200]) / seconds, 1),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "p50_ms": quantile(0.5),
        "p99_ms": quantile(0.99),
    }


if __name__ == "__main__":
    url, file, connections, seconds = sys.argv[1:5]
    print(json.dumps(run(url, Path(file).read_bytes(), int(connections), float(seconds))))
