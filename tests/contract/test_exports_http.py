"""Models in the formats of other tools over HTTP: what can be written here, by whom, and that nothing of it stays on the disk."""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from serving import in_process, registered, until
from standin import write_bundle
from starlette.testclient import TestClient

from finetune.errors import Overloaded
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from service import results
from service.child import ChildProgram
from service.exports import MAX_OF_OWNER, Exported, Exporter
from service.routes import models

VERSION = "/v1/models/colours/versions/1"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with in_process(tmp_path, onnxruntime_web=tmp_path / "onnxruntime-web") as client:
        yield client


def put_runtime(folder: Path) -> None:
    """Write files named as those of the npm package."""
    (folder / "dist").mkdir(parents=True)
    (folder / "dist" / "ort.wasm.bundle.min.mjs").write_text("export const env = {};")
    (folder / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm")


def test_the_network_alone_comes_as_a_zip_with_its_card(client: TestClient, tmp_path: Path) -> None:
    answer = client.get(f"{VERSION}/exports/onnx")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"] == 'attachment; filename="colours-1-onnx.zip"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["colours-1-onnx/README.md", "colours-1-onnx/model.onnx"]
        assert archive.read("colours-1-onnx/model.onnx") == client.get(f"{VERSION}/files/model.onnx").content
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_question_about_the_headers_alone_writes_and_reads_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("nobody reads the body")

    monkeypatch.setattr(ChildProgram, "run", fail)
    headed = client.head(f"{VERSION}/exports/onnx")
    assert (headed.status_code, headed.content) == (200, b"")
    assert headed.headers["content-disposition"] == 'attachment; filename="colours-1-onnx.zip"'
    assert client.head(f"{VERSION}/exports/web").status_code == 409
    assert client.head("/v1/models/colours/versions/7/exports/onnx").status_code == 404


def test_the_headers_of_a_bundle_come_without_reading_it(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    archive = results.bundle_archive

    def counted(*given: Any) -> Any:
        pieces, size = archive(*given)
        return (sent.append(len(piece)) or piece for piece in pieces), size

    monkeypatch.setattr(models, "bundle_archive", counted)
    whole = client.get(f"{VERSION}/bundle")
    assert sum(sent) == len(whole.content) > sent[0]
    sent.clear()
    headed = client.head(f"{VERSION}/bundle")
    assert (headed.status_code, headed.content, headed.headers["content-length"]) == (200, b"", str(len(whole.content)))
    assert len(sent) == 1, "the first piece only"


def test_a_page_without_a_server_is_one_file_where_its_runtime_is_installed(client: TestClient, tmp_path: Path) -> None:
    assert "web" not in client.get(VERSION).json()["exports"]
    refused = client.get(f"{VERSION}/exports/web")
    assert refused.status_code == 409
    assert "npm install onnxruntime-web" in refused.json()["detail"]
    put_runtime(tmp_path / "onnxruntime-web")
    assert "web" in client.get(VERSION).json()["exports"]
    answer = client.get(f"{VERSION}/exports/web")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"] == 'attachment; filename="colours-1-web.html"'
    assert answer.text.startswith("<!doctype html>")
    assert "colours, version 1" in answer.text


def test_a_format_that_is_unknown_or_that_a_model_cannot_have_is_refused(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get(f"{VERSION}/exports/keras").status_code == 422
    assert client.get("/v1/models/colours/versions/9/exports/onnx").status_code == 404
    given = {"code": "invalid_input", "message": "timm pools otherwise"}
    monkeypatch.setattr(ChildProgram, "run", lambda *_: {"error": given})
    answer = client.get(f"{VERSION}/exports/onnx")
    assert (answer.status_code, answer.json()["detail"]) == (422, "timm pools otherwise")


def test_who_may_use_a_model_may_take_it_along_and_nobody_else(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    asker, jobs = (
        {"Authorization": f"Bearer {keys.create(owner, (scope,))[0]}"} for owner, scope in (("ann", "predict"), ("bob", "jobs"))
    )
    admin = {"Authorization": f"Bearer {keys.create('root', ('admin',))[0]}"}
    until(lambda: client.get(VERSION).status_code == 401)
    assert client.get(f"{VERSION}/exports/onnx").status_code == 401
    assert client.get(f"{VERSION}/exports/onnx", headers=asker).status_code == 200
    registered(tmp_path, tmp_path / "bundle", "hers")
    assert client.patch("/v1/models/hers", json={"visibility": "private"}, headers=admin).status_code == 200
    for key in (asker, jobs):
        assert client.get("/v1/models/hers/versions/1/exports/onnx", headers=key).status_code == 404


def test_nobody_fills_the_queue_of_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (version,) = registered(tmp_path, write_bundle(tmp_path / "bundle")).list()
    go_on = threading.Event()

    def slow(_: ChildProgram, given: Mapping[str, Any], what: str) -> dict[str, Any]:
        assert go_on.wait(120)
        out = Path(given["out"])
        out.mkdir()
        (out / "model.onnx").write_bytes(b"model")
        return {"use": ""}

    monkeypatch.setattr(ChildProgram, "run", slow)

    async def ask() -> list[Exported]:
        exporter = Exporter(tmp_path / "exports", tmp_path)
        waiting = [asyncio.create_task(exporter.write(version, "onnx", "ann")) for _ in range(MAX_OF_OWNER)]
        await asyncio.sleep(0)  # each has taken its place
        with pytest.raises(Overloaded, match="are being written for you"):
            await exporter.write(version, "onnx", "ann")
        waiting.append(asyncio.create_task(exporter.write(version, "onnx", "bob")))
        await asyncio.sleep(0)
        go_on.set()
        found = [await one for one in waiting]
        found.append(await exporter.write(version, "onnx", "ann"))
        exporter.stop()
        return found

    for exported in asyncio.run(ask()):
        assert len(b"".join(exported.chunks())) == exported.size_bytes > 0
    assert list((tmp_path / "exports").iterdir()) == []
