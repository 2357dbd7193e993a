"""The server is killed at every point of taking in a dataset or a job, and started anew: nothing is lost or there twice.

What a client does when no answer comes: it sends the same request with the same Idempotency-Key again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from archives import photographs, zip_of
from crash_points import crashing_at
from processes import children_of, is_running
from serving import LiveServer, live_server, until

from finetune.data.contents import read_members

FILES, JOBS = "/v1/files", "/v1/fine_tuning/jobs"
ARCHIVE = zip_of(photographs())
Request = Callable[[httpx.Client], httpx.Response]


def upload(client: httpx.Client, key: str = "the-upload") -> httpx.Response:
    form = {"files": {"file": ("flowers.zip", ARCHIVE)}, "data": {"purpose": "fine-tune"}}
    return client.post(FILES, headers={"Idempotency-Key": key}, **form)  # type: ignore[arg-type]


def submit(client: httpx.Client) -> httpx.Response:
    file_id = upload(client).json()["id"]
    return client.post(JOBS, json={"training_file": file_id}, headers={"Idempotency-Key": "the-job"})


def kill(server: LiveServer) -> None:
    """The supervisor first, so that it starts no other; and what it started does not outlive it on its port."""
    children = children_of(server.process.pid)
    server.process.kill()
    until(lambda: not any(map(is_running, children)))


@pytest.mark.parametrize(
    ("send", "point", "committed"),
    [
        pytest.param(upload, "before rename file-*", False, marks=pytest.mark.slow),
        pytest.param(upload, "after rename file-*", False, marks=pytest.mark.slow),
        pytest.param(upload, "before commit jobs.db in FileStore.create", False, marks=pytest.mark.slow),
        pytest.param(upload, "after commit jobs.db in FileStore.create", True, marks=pytest.mark.slow),
        pytest.param(submit, "before commit jobs.db in JobStore.create", False, marks=pytest.mark.slow),
        pytest.param(submit, "after commit jobs.db in JobStore.create", True),
    ],
)
@pytest.mark.longer
def test_a_request_whose_server_was_killed_at(
    point: str, send: Request, committed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as crashing:
        for name, value in crashing_at(point, tmp_path / "crashed").items():
            crashing.setenv(name, value)
        with live_server(tmp_path, ready=False) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            with pytest.raises(httpx.TransportError):
                send(client)
            assert (tmp_path / "crashed").exists(), "the point was not reached"
            kill(server)

    with live_server(tmp_path, ready=False) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        path = FILES if send is upload else JOBS
        found = [one["id"] for one in client.get(path).json()["data"]]
        assert len(found) == committed
        again = send(client)
        assert again.status_code == 201
        assert again.headers.get("Idempotent-Replayed") == ("true" if committed else None)
        assert not committed or again.json()["id"] == found[0]
        assert send(client).json()["id"] == again.json()["id"]
        (file,) = client.get(FILES).json()["data"]
        assert len(client.get(JOBS).json()["data"]) == (send is submit)
        contents = tmp_path / "files" / file["id"]
        assert {one.name.decode().removeprefix("./") for one in read_members(contents) if one.sha256} == set(photographs())
        assert not list((tmp_path / "files").glob(".arriving-*")), "what was arriving is swept away"


@pytest.mark.slow
def test_an_upload_whose_server_was_killed_while_it_arrived_leaves_nothing(tmp_path: Path) -> None:
    killed = threading.Event()

    def half_a_body() -> Iterator[bytes]:
        yield b'--edge\r\nContent-Disposition: form-data; name="file"; filename="flowers.zip"\r\n\r\n'
        yield bytes(4 << 20)
        assert killed.wait(60)

    def arrived() -> int:
        return sum(archive.stat().st_size for archive in tmp_path.glob("files/.arriving-*/archive"))

    broken: list[Exception] = []

    def send(url: str) -> None:
        headers = {"Content-Type": "multipart/form-data; boundary=edge", "Idempotency-Key": "the-upload"}
        try:
            httpx.post(f"{url}{FILES}", content=half_a_body(), headers=headers, timeout=60)
        except httpx.TransportError as error:
            broken.append(error)

    with live_server(tmp_path, ready=False) as server:
        client = threading.Thread(target=send, args=(server.url,))
        client.start()
        until(lambda: arrived() > 0)
        os.kill(server.process.pid, signal.SIGKILL)
        kill(server)
        killed.set()
        client.join(60)
    assert broken
    assert list(tmp_path.glob("files/.arriving-*"))
    with live_server(tmp_path, ready=False) as server, httpx.Client(base_url=server.url, timeout=60) as again:
        assert list((tmp_path / "files").iterdir()) == []
        assert again.get(FILES).json()["data"] == []
        first = upload(again)
        assert (first.status_code, first.headers.get("Idempotent-Replayed")) == (201, None)
