"""Listen on one address and serve the application with uvicorn, in this process and on this one socket."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from finetune.errors import Conflict, InvalidInput
from finetune.jobs.database import DATABASE_VARIABLE, open_jobs
from finetune.jobs.keys import KeyStore
from finetune.runtime.allocator import limit_free_memory
from finetune.runtime.logs import configure_logs
from service.asgi import create_app
from service.connections import LimitedConnection
from service.limits import KEEP_ALIVE_SECONDS
from service.settings import ServerSettings

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 3000
GRACEFUL_SHUTDOWN_SECONDS = 10  # how long requests in flight may take to finish after SIGTERM
_BACKLOG = 2048

log = logging.getLogger(__name__)


class PortTaken(Conflict):
    """Another program uses the port."""

    code = "port_taken"


def serve(settings: ServerSettings, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in flight and return.

    Raises:
        InvalidInput: `host` is not an IP address, or other machines can reach it although there is no API key.
        PortTaken: another program uses the port.
        StoreError: the job database cannot be used.
    """
    limit_free_memory(max(2, settings.threads))
    if not settings.home.exists():
        settings.home.mkdir(parents=True, mode=0o700)  # images, hashes of keys and logs must not be readable by other users
    address = listen_address(host, has_api_key=has_api_key(settings.home))
    listener = listen(address, port)
    configure_logs("service", as_json=settings.json_logs)
    config = uvicorn.Config(
        create_app(settings.answering_to(address)),
        http=LimitedConnection,
        ws="none",
        lifespan="on",
        interface="asgi3",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
        backlog=_BACKLOG,
    )
    shown = f"[{address}]" if ":" in address else address
    serves = f"finetune serves on http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops it)"
    if settings.json_logs:
        log.info(serves)
    else:
        sys.stderr.write(f"{serves}\n")
    server = _Server(config)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)  # the cause is in the log


class _Server(uvicorn.Server):
    """uvicorn's server with exit code 0 after it was asked to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def has_api_key(home: Path) -> bool:
    """Return whether this workspace's job database has a valid key. A workspace without a database has none."""
    if not os.environ.get(DATABASE_VARIABLE) and not (home / "jobs.db").exists():
        return False
    engine = open_jobs(home)
    try:
        return KeyStore(engine).any_usable()
    finally:
        engine.dispose()


def listen_address(host: str, *, has_api_key: bool) -> str:
    """Return `host` as an IP address. Raises InvalidInput unless it is a loopback address or there is an API key."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InvalidInput(f"--host {host}: an IP address to listen on is needed, such as 127.0.0.1") from None
    if not address.is_loopback and not has_api_key:
        raise InvalidInput(
            f"--host {host}: others could reach this address, and there is no API key that would keep strangers out. "
            "Make one with finetune keys create, or listen on 127.0.0.1 (the default)"
        )
    return str(address)


def listen(address: str, port: int) -> socket.socket:
    """Return a bound socket; connections are accepted once the application has started."""
    # asyncio disables Nagle's algorithm only on sockets created with IPPROTO_TCP; it would delay each response by 40 ms
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"--port {port}: another program already listens on {address} port {port}. Stop it, or give another --port"
            ) from None
        raise InvalidInput(f"--host {address} --port {port}: cannot be listened on: {error.strerror}") from None
    listener.set_inheritable(False)
    return listener
