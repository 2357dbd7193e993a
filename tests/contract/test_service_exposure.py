"""What others can reach of a running server: one socket, nothing from a foreign page, no connection held by silence."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
from serving import END_SECONDS, LiveServer, in_process, live_server, registered, until
from standin import picture, write_bundle
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from service.connections import LimitedConnection
from service.server import listen


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    registered(folder, write_bundle(folder / "bundle"))
    return folder


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[TestClient]:
    with in_process(home) as client:
        yield client


def port_of(server: LiveServer) -> int:
    return int(server.url.rpartition(":")[2])


def listening(server: LiveServer) -> list[tuple[str, int]]:
    """Every address at which a process of the server takes connections or datagrams, Unix sockets included."""
    found = []
    for pid in server.process_tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(pid).net_connections(kind="all"):
                if one.family == socket.AF_UNIX:
                    found += [(one.laddr, 0)] if one.laddr else []
                elif one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM:
                    found.append((one.laddr.ip, one.laddr.port))
    return found


@pytest.mark.parametrize("worker", [False, True], ids=["alone", "with a worker"])
def test_a_server_and_all_its_processes_listen_on_exactly_one_socket(home: Path, worker: bool) -> None:
    with live_server(home, worker=worker) as server:
        if worker:
            until(lambda: len(server.process_tree()) == 2)
        assert listening(server) == [("127.0.0.1", port_of(server))]
        assert httpx.post(f"{server.url}/predict", content=picture(), timeout=END_SECONDS).status_code == 200
        assert listening(server) == [("127.0.0.1", port_of(server))]
        assert len(server.process_tree()) == 1 + worker


def test_a_port_that_is_taken_is_said_in_one_sentence(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, "-m", "service", "--port", str(port)],
            check=False, capture_output=True, text=True, timeout=240, env={**os.environ, "FINETUNE_HOME": str(home)},
        )  # fmt: skip
    assert ran.returncode == 1
    assert f"another program already listens on 127.0.0.1 port {port}" in ran.stderr
    assert "Traceback" not in ran.stderr


# --- pages in a browser ---------------------------------------------------------------------------


CHANGING = [
    ("POST", "/predict"),
    ("POST", "/v1/files"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel"),
    ("DELETE", "/v1/files/file-x"),
    ("DELETE", "/v1/models/colours"),
    ("PUT", "/v1/models/colours/aliases/champion"),
]
FOREIGN: list[dict[str, str]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:9999"},  # a page that another program on this machine serves
    {"Origin": "http://localhost:3000"},  # the same machine under another of its names
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "cross-site"},
]


@pytest.mark.parametrize(("method", "path"), CHANGING)
def test_a_page_of_another_origin_changes_nothing(client: TestClient, method: str, path: str) -> None:
    for headers in FOREIGN:
        answer = client.request(method, path, headers=headers, content=picture())
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_not_allowed"), headers


def test_the_servers_own_page_and_programs_may(client: TestClient) -> None:
    for headers in ({}, {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert client.post("/predict", headers=headers, content=picture()).status_code == 200


def test_a_foreign_page_cannot_read_but_a_link_to_the_page_works(client: TestClient) -> None:
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert client.get("/v1/models", headers=embedded).status_code == 403
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/", headers=followed).status_code == 200


def test_no_answer_allows_another_origin_unless_it_is_configured(client: TestClient, home: Path) -> None:
    preflight = {
        "Origin": "https://app.example",
        "Sec-Fetch-Site": "cross-site",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    refused = client.options("/predict", headers=preflight)
    assert refused.status_code == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]
    with in_process(home, cors_origins=("https://app.example",)) as configured:
        allowed = configured.options("/predict", headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://app.example")
        asked = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
        answer = configured.post("/predict", headers=asked, content=picture())
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert configured.post("/predict", headers={"Origin": "https://evil.example"}, content=picture()).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", ""])
def test_a_foreign_host_name_is_refused(client: TestClient, host: str) -> None:
    answer = client.get("/v1/models", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (400, "host_not_allowed")


# --- connections ----------------------------------------------------------------------------------


@contextlib.contextmanager
def listening_with(**limits: float) -> Iterator[tuple[tuple[str, int], type[LimitedConnection]]]:
    """A small application on a free port; yields its address and the class of its connections, which has these limits."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    listener = listen("127.0.0.1", 0)
    kind = type("Limited", (LimitedConnection,), limits)
    config = uvicorn.Config(app, http=kind, lifespan="off", interface="asgi3", log_config=None, timeout_keep_alive=240)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield listener.getsockname(), kind
    finally:
        server.should_exit = True
        thread.join()


def raw(address: tuple[str, int], sent: bytes = b"") -> bytes:
    """What comes back until the server closes the connection."""
    with socket.create_connection(address, timeout=240) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
        return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            told += chunk
    return told


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_connection_that_sends_no_request_or_half_of_one_is_closed() -> None:
    with listening_with(head_seconds=0.1) as (address, limited):
        for silent in (b"", b"GET /li", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-"):
            assert raw(address, silent).startswith(b"HTTP/1.1 408")
        limited.head_seconds = 240.0  # a whole request, however long a busy machine takes to send it
        with socket.create_connection(address, timeout=240) as connection:
            connection.sendall(REQUEST)
            answered = b""
            while not answered.endswith(b"ok"):
                received = connection.recv(65536)
                assert received, answered
                answered += received
            limited.head_seconds = 0.1
            connection.sendall(b"GET /li")  # the second request on the same connection stops half way
            assert b"HTTP/1.1 408" in read_to_end(connection)


def test_a_head_has_a_largest_size() -> None:
    with listening_with(max_head_bytes=1000) as (address, _):
        assert raw(address, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 2000).startswith(b"HTTP/1.1 431")
        assert raw(address, REQUEST[:-2] + b"Connection: close\r\n\r\n").endswith(b"ok")


@pytest.mark.parametrize(
    "lengths",
    [b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Content-Length: 5\r\nContent-Length: 6"],
    ids=["length and chunks", "two lengths"],
)
def test_a_body_has_one_length(lengths: bytes) -> None:
    with listening_with() as (address, _):
        sent = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + lengths + b"\r\n\r\n0\r\n\r\n"
        assert raw(address, sent).startswith(b"HTTP/1.1 400")


def test_connections_on_which_nothing_is_asked_make_room_and_those_in_use_do_not() -> None:
    unfinished = REQUEST.replace(b"GET", b"POST")[:-2] + b"Content-Length: 5\r\n\r\n"
    with listening_with(max_connections=4, head_seconds=240.0) as (address, _), contextlib.ExitStack() as held:

        def connect() -> socket.socket:
            return held.enter_context(socket.create_connection(address, timeout=240))

        silent = [connect() for _ in range(4)]
        assert raw(address, REQUEST[:-2] + b"Connection: close\r\n\r\n").endswith(b"ok")
        assert silent[0].recv(100) == b"", "it had waited longest"
        in_use = [connect() for _ in range(4)]
        for connection in in_use:
            connection.sendall(unfinished)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert all(connection.recv(100) == b"" for connection in silent[1:])
        assert raw(address).startswith(b"HTTP/1.1 503")
        for connection in in_use:
            connection.close()
        until(lambda: raw(address, REQUEST[:-2] + b"Connection: close\r\n\r\n").endswith(b"ok"))
