"""The real server: its process tree, its sockets and its end, asked by curl and by BentoML's own client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bentoml
import httpx
import pytest
from bentoml.exceptions import BentoMLException
from processes import is_running
from serving import END_SECONDS, LiveServer, live_server, port_in, registered, until
from standin import picture, write_bundle

from finetune.bundle.predictor import Predictor

TRAINING_MODULES = ("torch", "torchvision", "timm", "albumentations", "cv2", "mlflow", "onnx", "sklearn", "scipy", "matplotlib")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    registered(folder, write_bundle(folder / "bundle"))
    (folder / "red.png").write_bytes(picture("red"))
    (folder / "text.png").write_bytes(b"http://127.0.0.1:1/cat.jpg")
    (folder / "huge.png").write_bytes(b"\0" * (70 * 1024 * 1024))
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[LiveServer]:
    with live_server(home) as server:
        yield server


def curl(*arguments: str) -> tuple[int, dict[str, object]]:
    ran = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", *arguments], capture_output=True, text=True, check=True, timeout=240
    )
    body, _, status = ran.stdout.rpartition("\n")
    return int(status), json.loads(body)


def labels(answer: dict[str, object]) -> list[tuple[str, float]]:
    rows = answer["predictions"]
    assert isinstance(rows, list)
    return [(row["label"], row["probability"]) for row in rows]


def test_curl_sends_a_file_in_every_usual_way_and_all_answers_equal_the_predictors(server: LiveServer, home: Path) -> None:
    expected = list(Predictor.load(home / "models" / "colours" / "1").predict(picture("red"), top_k=2).labels)
    file, url = str(home / "red.png"), f"{server.url}/predict"
    ways = [
        ("-F", f"image=@{file}", "-F", "top_k=2", url),
        ("-F", f"image=@{file};type=image/jpg", f"{url}?top_k=2"),
        ("--data-binary", f"@{file}", f"{url}?top_k=2"),
        ("--data-binary", f"@{file}", "-H", "Content-Type: image/png", f"{url}?top_k=2"),
        ("--data-binary", f"@{file}", "-H", "Content-Type:", f"{url}?top_k=2"),
        ("--data-binary", f"@{file}", "-H", "Transfer-Encoding: chunked", f"{url}?top_k=2"),
        ("-F", f"image=@{file}", "-F", "top_k=2", f"{server.url}/v1/models/colours/predict"),
    ]
    for way in ways:
        status, answer = curl(*way)
        assert (status, labels(answer)) == (200, expected), way


def test_curl_is_told_what_is_wrong(server: LiveServer, home: Path) -> None:
    url = f"{server.url}/predict"
    wrong = {
        ("-F", f"image=@{home}/text.png", url): (415, "unsupported_image"),
        ("-F", "image=http://127.0.0.1:1/cat.jpg", url): (422, "invalid_input"),
        ("-F", f"image=@{home}/huge.png", url): (413, "request_too_large"),
        ("--data-binary", f"@{home}/huge.png", "-H", "Transfer-Encoding: chunked", url): (413, "request_too_large"),
        ("-X", "POST", url): (422, "invalid_input"),
        ("-H", "Host: evil.example", f"{server.url}/v1/models"): (400, "host_not_allowed"),
    }
    for arguments, expected in wrong.items():
        status, problem = curl(*arguments)
        assert (status, problem["code"]) == expected, arguments


def test_bentomls_own_client_predicts_explains_and_reads_errors(server: LiveServer, home: Path) -> None:
    with bentoml.SyncHTTPClient(server.url) as client:
        answer = client.predict(image=home / "red.png", top_k=2)
        assert labels(answer) == list(Predictor.load(home / "models" / "colours" / "1").predict(picture("red"), top_k=2).labels)
        assert client.predict(image=home / "red.png", top_k=None, explain=True)["explanation"]["label"] == "red"
        for file, code in (("text.png", "unsupported_image"), ("huge.png", "request_too_large")):
            with pytest.raises(BentoMLException, match=code):
                client.predict(image=home / file)


def test_the_serving_process_holds_nothing_that_trains(server: LiveServer) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert [name for name in ("libtorch", "/torch/", "/cv2/", "/scipy/", "/pyarrow/") if name in maps] == []


NOTHING_THAT_TRAINS = """
import sys
import time
tried = []
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            tried.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import service.app
service.app.Service.to_asgi()
print(tried)
"""


def test_the_service_is_built_without_trying_to_import_anything_that_trains() -> None:
    code = NOTHING_THAT_TRAINS.replace("{modules!r}", repr(TRAINING_MODULES))
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert ran.stdout.strip() == "[]"


def test_metrics_count_by_route_template_and_unknown_paths_add_one_series_only(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, timeout=END_SECONDS) as client:
        for number in range(50):
            client.get(f"/scan/{number}")
            client.post(f"/v1/models/unknown-{number}/predict", content=b"x")
        assert client.request("PROPFIND", "/pot").status_code == 404
        text = client.get("/metrics").text
    series = [line for line in text.splitlines() if line.startswith("finetune_requests_total")]
    assert 'finetune_requests_total{method="GET",route="unmatched",status="404"} 50.0' in series
    assert 'finetune_requests_total{method="POST",route="/v1/models/{name}/predict",status="404"} 50.0' in series
    assert "unknown-" not in text
    assert "process_resident_memory_bytes" in text
    assert 'finetune_requests_total{method="other",route="unmatched",status="404"} 1.0' in series


def test_a_client_that_goes_away_in_the_middle_of_its_upload_is_not_an_error_of_the_server(server: LiveServer) -> None:
    host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
    with socket.create_connection((host, port)) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\nX-Request-Id: gone\r\n\r\nhalf")
    until(lambda: b"gone POST /predict 499" in server.log.read_bytes())
    assert b"Traceback" not in server.log.read_bytes()


def test_a_request_in_flight_is_answered_before_the_server_ends(home: Path) -> None:
    image = picture("green")
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n".encode()
    with live_server(home) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=240) as idle, socket.create_connection(address, timeout=240) as busy:
            busy.sendall(head + b"Expect: 100-continue\r\n\r\n")
            assert told(busy, b"\r\n\r\n").startswith(b"HTTP/1.1 100")  # the server waits for the body: the request is in flight
            busy.sendall(image[:10])
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert told(idle, b'"ok"}').startswith(b"HTTP/1.1 200")
            server.process.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""  # the server has closed what was idle: it is on its way out
            busy.sendall(image[10:])
            answer = b""
            while chunk := busy.recv(65536):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"label":"green"' in answer
        assert server.process.wait(timeout=END_SECONDS) == 0


def told(connection: socket.socket, end: bytes) -> bytes:
    """What a server says up to `end`; it may come in pieces."""
    heard = b""
    while not heard.endswith(end):
        received = connection.recv(65536)
        assert received, heard
        heard += received
    return heard


def test_the_log_can_be_json_with_request_ids_and_without_secrets(home: Path) -> None:
    with live_server(home, worker=True, environment={"FINETUNE_LOG_FORMAT": "json"}) as server:
        headers = {"X-Request-Id": "mine-1", "Authorization": "Bearer ft_secretsecret"}
        assert httpx.post(f"{server.url}/predict", content=picture(), headers=headers, timeout=END_SECONDS).status_code == 200
        until(lambda: '"mine-1"' in server.log.read_text())  # the line is written after the answer has left
        until(lambda: "waits for jobs" in server.log.read_text())
    text = server.log.read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    assert {"service.server", "service.access", "finetune.jobs.worker"} <= {entry["logger"] for entry in entries}
    (entry,) = [entry for entry in entries if entry.get("request_id") == "mine-1"]
    assert (entry["status"], entry["route"], entry["owner"], entry["level"]) == (200, "/predict", "local", "info")
    assert "secretsecret" not in text


def test_metrics_tell_where_the_time_of_predictions_goes(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, timeout=END_SECONDS) as client:
        client.post("/predict", content=picture())
        text = client.get("/metrics").text
    for stage in ("decode", "preprocess", "run"):
        assert re.search(rf'finetune_prediction_seconds_count\{{model="colours",stage="{stage}"\}} [1-9]', text)
    assert "finetune_predictions_waiting 0.0" in text
    assert 'finetune_default_model{model="colours",version="1"} 1.0' in text


def test_an_execution_provider_that_is_not_installed_is_named_at_start(home: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "service", "--port", "0"], check=False, capture_output=True, text=True, timeout=240,
        env={**os.environ, "FINETUNE_HOME": str(home), "FINETUNE_PROVIDER": "cuda"},
    )  # fmt: skip
    assert ran.returncode == 2
    assert "no execution provider for 'cuda' here; it has cpu" in ran.stderr


@pytest.mark.longer
def test_a_server_outlives_the_shell_that_started_it(home: Path, tmp_path: Path) -> None:
    """What ``nohup finetune serve &`` promises to somebody who logs out."""
    log = tmp_path / "server.log"
    log.touch()
    script = f"exec 3<&0; {sys.executable} -m service --port 0 --no-worker <&- 2>{log} & echo $!; read line <&3"
    environment = {**os.environ, "FINETUNE_HOME": str(home)}
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            until(lambda: port_in(log) is not None and answers(port_in(log)))
            assert shell.stdin is not None
            shell.stdin.close()
            shell.wait(timeout=END_SECONDS)
            for _ in range(20):
                assert is_running(pid)
                until(lambda: answers(port_in(log)))
                time.sleep(0.05)
        finally:
            os.kill(pid, signal.SIGKILL)


def answers(port: int | None) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez").is_success
    except httpx.TransportError:
        return False
