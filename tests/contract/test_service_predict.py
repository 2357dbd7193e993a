"""POST /predict and POST /v1/models/{name}/predict: every way in, every answer, every refusal."""

from __future__ import annotations

import base64
import io
import pickle
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward import AWKWARD, READABLE, REFUSED
from PIL import Image
from serving import URL, in_process, registered, until
from standin import NO_CAM_REASON, picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.predictor import Predictor
from service.asgi import create_api, with_middleware
from service.bento import build_service
from service.schemas.predictions import PredictionAnswer
from service.settings import ServerSettings

UNASKED = ("embedding", "prediction_set", "abstained", "reason", "novelty")  # parts of an answer that were not asked for
PATHS = ("/predict", "/v1/models/colours/predict")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    registered(folder, write_bundle(folder / "mapless", cam=False), "mapless")
    registered(folder, write_bundle(folder / "colours"), "colours")
    return folder


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[TestClient]:
    with in_process(home, model="colours") as client:
        yield client


@pytest.fixture(scope="module")
def predictor(home: Path) -> Predictor:
    return Predictor.load(home / "models" / "colours" / "1")


def labels(answer: Any) -> list[str]:
    return [row["label"] for row in answer["predictions"]]


# --- ways in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content_type", ["image/png", "image/jpg", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_an_image_as_the_raw_body_is_classified_whatever_curl_calls_it(
    client: TestClient, path: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post(path, content=picture("green"), headers=headers)
    assert answer.status_code == 200
    assert labels(answer.json())[0] == "green"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("part_type", ["image/png", "image/jpg", "image/jpeg", "application/octet-stream", "text/plain"])
def test_an_image_as_a_multipart_file_is_classified_whatever_its_part_is_called(
    client: TestClient, path: str, part_type: str
) -> None:
    answer = client.post(path, files={"image": ("holiday.bin", picture("blue"), part_type)})
    assert answer.status_code == 200
    assert labels(answer.json())[0] == "blue"


def test_the_answer_names_model_version_probabilities_and_timings(client: TestClient, predictor: Predictor) -> None:
    answer = client.post("/predict", files={"image": picture("red")}).json()
    assert (answer["model"], answer["version"]) == ("colours", "1")
    expected = predictor.predict(picture("red")).labels
    assert [(row["label"], row["probability"]) for row in answer["predictions"]] == list(expected)
    assert answer["explanation"] is None
    assert answer["timings"]["total_ms"] >= answer["timings"]["predict_ms"] > 0


def test_options_come_from_the_query_or_the_form_and_the_form_wins(client: TestClient) -> None:
    image = {"image": picture()}
    assert len(labels(client.post("/predict", files=image).json())) == 3
    assert len(labels(client.post("/predict?top_k=1", files=image).json())) == 1
    assert len(labels(client.post("/predict?top_k=1", content=picture()).json())) == 1
    assert len(labels(client.post("/predict", files=image, data={"top_k": "2"}).json())) == 2
    assert len(labels(client.post("/predict?top_k=1", files=image, data={"top_k": "2"}).json())) == 2
    assert client.post("/predict?top_k=0", files=image, data={"top_k": "2"}).status_code == 422


def test_every_version_and_alias_can_be_asked_for_by_name(client: TestClient) -> None:
    for reference in ("colours", "colours@1", "colours@latest"):
        assert client.post(f"/v1/models/{reference}/predict", content=picture()).json()["version"] == "1"


def test_the_bentoml_method_gives_the_same_answer_without_http(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "blue.png"
    file.write_bytes(picture("blue"))
    settings = ServerSettings(home, model="colours")
    api = create_api(settings)
    service = build_service(with_middleware(api, settings), api)
    with TestClient(service.to_asgi(), base_url=URL) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        called = service().predict(image=file, top_k=2, explain=True)
        posted = PredictionAnswer.model_validate(client.post("/predict?top_k=2&explain=1", content=picture("blue")).json())
    only_of_several = {"labels", "scores", "thresholds"}
    assert called.model_dump(exclude={"timings", "labels"}) == posted.model_dump(exclude={"timings", *UNASKED, *only_of_several})
    assert called.labels == [], "an image of this model has one label"


# --- explain --------------------------------------------------------------------------------------


def test_explain_gives_the_map_as_numbers_and_as_a_picture(client: TestClient, predictor: Predictor) -> None:
    explanation = client.post("/predict?explain=true", content=picture("red")).json()["explanation"]
    expected = predictor.predict(picture("red"))
    assert explanation["label"] == "red"
    np.testing.assert_array_equal(np.array(explanation["cam"], np.float32), expected.cam)
    overlay = Image.open(io.BytesIO(base64.b64decode(explanation["overlay_png_base64"])))
    assert Image.open(io.BytesIO(base64.b64decode(explanation["image_jpeg_base64"]))).size == overlay.size
    assert (overlay.format, overlay.size) == ("PNG", expected.image.shape[1::-1])


def test_explain_on_a_model_without_a_map_answers_null_and_says_why(client: TestClient) -> None:
    answer = client.post("/v1/models/mapless/predict?explain=true", content=picture())
    assert answer.status_code == 200
    assert answer.json()["explanation"] == {
        "label": "red",
        "cam": None,
        "overlay_png_base64": None,
        "image_jpeg_base64": None,
        "reason": NO_CAM_REASON,
    }


# --- refusals -------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few kilobytes that would decode to 20,000 × 20,000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    return stream.getvalue()


BAD_IMAGES = {
    "garbage": (b"\x00\x01 not an image", 415, "unsupported_image"),
    "text": (b"hello", 415, "unsupported_image"),
    "html": (b"<html><body>404</body></html>", 415, "unsupported_image"),
    "truncated": (picture(file_format="JPEG")[:200], 422, "invalid_image"),
    "bomb": (bomb(), 413, "image_too_large"),
    "empty": (b"", 422, "invalid_input"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_usable_image_is_refused_in_both_forms(client: TestClient, path: str, name: str) -> None:
    data, status, code = BAD_IMAGES[name]
    for answer in (client.post(path, content=data), client.post(path, files={"image": ("cat.jpg", data, "image/jpeg")})):
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("name", REFUSED)
def test_every_refused_awkward_file_is_refused_with_the_decoders_own_words(client: TestClient, name: str) -> None:
    data, expected = AWKWARD[name]
    answer = client.post("/predict", files={"image": ("awkward", data, "image/jpeg")})
    assert answer.status_code == (422 if not data else expected.error.http_status)
    assert not data or expected.says in answer.json()["detail"]


@pytest.mark.parametrize("name", READABLE)
def test_every_readable_awkward_file_gets_the_same_answer_over_http_as_from_the_predictor(
    client: TestClient, predictor: Predictor, name: str
) -> None:
    data, _ = AWKWARD[name]
    answer = client.post("/predict", content=data).json()
    assert [(row["label"], row["probability"]) for row in answer["predictions"]] == list(predictor.predict(data).labels)


@pytest.fixture
def canary() -> Iterator[tuple[str, list[bytes]]]:
    """A listener that nobody must connect to, and what it heard."""
    heard: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            heard.append(b"connected")
            connection.close()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/cat.jpg", heard
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_a_url_in_place_of_an_image_is_refused_and_never_fetched(client: TestClient, canary: tuple[str, list[bytes]]) -> None:
    url, heard = canary
    answers = [
        client.post("/predict", files={"image": (None, url)}),
        client.post("/predict", data={"image": url}),
        client.post("/predict", json={"image": url}),
        client.post("/predict", json=url),
        client.post("/predict", content=url),
        client.post("/predict", content=url, headers={"Content-Type": "text/plain"}),
        client.post("/predict", files={"image": ("cat.url", url.encode(), "image/png")}),
    ]
    assert [answer.status_code for answer in answers] == [422, 415, 415, 415, 415, 415, 415]
    assert heard == []


def test_the_canary_itself_hears_a_connection(canary: tuple[str, list[bytes]]) -> None:
    url, heard = canary
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as connection:
        assert connection.recv(1) == b""
    assert heard == [b"connected"]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/vnd.bentoml+pickle",
        "APPLICATION/vnd.bentoml+PICKLE; x=y",
        "text/plain",
        "application/zip",
        "nonsense",
    ],
)
def test_a_body_of_another_type_is_415_and_never_unpickled(client: TestClient, content_type: str) -> None:
    answer = client.post("/predict", content=pickle.dumps(picture()), headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        ({"files": {"picture": ("a.png", picture())}}, 422, "no field 'image'"),
        ({"files": [("image", ("a.png", picture())), ("image", ("b.png", picture()))]}, 422, "the repeated field 'images'"),
        ({"files": {"image": ("a.png", picture())}, "data": {"topk": "3"}}, 422, "topk"),
        ({"files": {"image": ("a.png", picture())}, "data": {"top_k": ["1", "2"]}}, 422, "more than once: top_k"),
        ({"files": [("image", ("a.png", picture())), ("image", (None, "b"))]}, 422, "more than once: image"),
        ({"files": {"image": ("a.png", picture())}, "data": {"top_k": "three"}}, 422, "top_k"),
        ({"files": {"image": ("a.png", picture())}, "data": {"top_k": "x" * 5000}}, 422, "top_k"),
        ({"content": b"no boundary here", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "multipart"),
        ({"content": b"anything", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
    ],
)
def test_a_form_that_is_off_is_refused_with_the_field_named(
    client: TestClient, sent: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post("/predict", **sent)
    assert answer.status_code == status
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    ("query", "field"),
    [("top_k=0", "top_k"), ("top_k=1.5", "top_k"), ("explain=perhaps", "explain"), ("k=3", "k")],
)
def test_an_option_out_of_range_is_422_with_its_path(client: TestClient, query: str, field: str) -> None:
    answer = client.post(f"/predict?{query}", content=picture())
    assert answer.status_code == 422
    problem = answer.json()
    assert [one["field"] for one in problem["errors"]] == [field]
    assert problem["error"]["param"] == field


@pytest.mark.parametrize(
    "reference",
    ["nothing", "colours@7", "colours@challenger", "..", "%2e%2e", "a" * 300, "Colours", "colours@../1", "%00", "colours%0a"],
)
def test_an_unknown_model_is_404(client: TestClient, reference: str) -> None:
    answer = client.post(f"/v1/models/{reference}/predict", content=picture())
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


# --- several images, embeddings -------------------------------------------------------------------


def test_more_classes_than_there_are_gives_all_of_them(client: TestClient) -> None:
    answer = client.post("/predict?top_k=1000", content=picture())
    assert answer.status_code == 200
    assert len(answer.json()["predictions"]) == 3


def test_a_part_without_a_file_name_is_a_file_when_its_type_says_so(client: TestClient) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="image"\r\nContent-Type: image/png\r\n\r\n'
    body = head + picture("green") + b"\r\n--B--\r\n"
    answer = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert (answer.status_code, labels(answer.json())[0]) == (200, "green")


def test_several_images_are_answered_in_order_and_a_bad_one_keeps_none_of_the_others(client: TestClient) -> None:
    sent = [("images", (f"{colour}.png", picture(colour))) for colour in ("red", "green", "blue")]
    sent.insert(1, ("images", ("broken.png", b"\x89PNG\r\n\x1a\nnothing")))
    sent.insert(3, ("images", ("empty.png", b"")))
    answer = client.post("/predict?top_k=1", files=sent).json()
    assert (answer["object"], answer["model"], answer["version"], answer["n_failed"]) == ("list", "colours", "1", 2)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3, 4]
    assert [one["filename"] for one in answer["data"]] == ["red.png", "broken.png", "green.png", "empty.png", "blue.png"]
    found = [one["result"]["predictions"][0]["label"] if one["result"] else one["error"]["code"] for one in answer["data"]]
    assert found == ["red", "invalid_image", "green", "invalid_image", "blue"]
    for one in answer["data"]:
        assert (one["result"] is None) != (one["error"] is None)


def test_one_image_in_the_list_field_is_a_list_too(client: TestClient) -> None:
    answer = client.post("/v1/models/colours/predict", files=[("images", ("red.png", picture("red")))]).json()
    assert len(answer["data"]) == 1
    assert "embedding" not in answer["data"][0]["result"]


def test_an_idle_server_answers_several_full_requests_at_once(client: TestClient) -> None:
    files = [("images", ("red.png", picture("red")))] * 64
    with ThreadPoolExecutor(3) as pool:
        answers = [answer.result() for answer in [pool.submit(client.post, "/predict?top_k=1", files=files) for _ in range(3)]]
    assert [(answer.status_code, len(answer.json()["data"]), answer.json()["n_failed"]) for answer in answers] == [
        (200, 64, 0)
    ] * 3


def test_too_many_images_and_both_fields_are_refused(client: TestClient) -> None:
    many = client.post("/predict", files=[("images", ("a.png", b"x"))] * 65)
    assert (many.status_code, many.json()["errors"][0]["field"]) == (422, "images")
    both = client.post("/predict", files=[("images", ("a.png", picture())), ("image", ("b.png", picture()))])
    assert (both.status_code, both.json()["errors"][0]["field"]) == (422, "image")


def test_an_embedding_is_answered_where_it_is_asked_for(client: TestClient, predictor: Predictor) -> None:
    expected = predictor.predict(picture("red")).embedding
    answer = client.post("/predict?embedding=true", content=picture("red")).json()
    np.testing.assert_array_equal(np.array(answer["embedding"], np.float32), expected)
    assert "embedding" not in client.post("/predict", content=picture("red")).json()
