"""Sets of labels, abstention and the model card, over HTTP: what is asked, what the owner switches on, what old bundles say."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import in_process, registered, until
from standin import picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.calibration import Calibration, OperatingPoint
from finetune.client import Client
from finetune.metrics.novelty import Subspace

# A plain colour has 0.96 for its class (softmax of 4, 0, 0) and 0.018 for each other; grey has a third for each.
CALIBRATION = Calibration(
    split="val",
    n=40,
    coverage={"0.90": 0.5, "0.95": 0.01},
    class_coverage={"0.80": (None, 0.5, 0.5), "0.90": (0.5, 0.01, None), "0.95": (None, None, None)},
    precision={"0.90": OperatingPoint(0.5, 0.9), "0.95": OperatingPoint(0.97, 0.4)},
    novelty=tuple(np.linspace(0.4, 0.8, 97)),  # from the mean embedding, which is grey, a plain colour is 0.85 away
)
GREY_IS_KNOWN = Subspace(np.full(3, 1 / np.sqrt(3), np.float32), np.zeros((0, 3), np.float32))
RED_IS_KNOWN = Subspace(np.array([1, 0, 0], np.float32), np.zeros((0, 3), np.float32))


def grey() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (128, 128, 128)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    registered(tmp_path, write_bundle(tmp_path / "old"), "old")
    registered(tmp_path, write_bundle(tmp_path / "reds", calibration=CALIBRATION, subspace=RED_IS_KNOWN), "reds")
    registered(tmp_path, write_bundle(tmp_path / "colours", calibration=CALIBRATION), "colours")
    with in_process(tmp_path, model="colours") as client:
        yield client


def asked(client: TestClient, query: str, image: bytes | None = None, model: str = "colours") -> dict:
    answer = client.post(f"/v1/models/{model}/predict?{query}", content=image or picture("red"))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_nothing_is_said_that_nobody_asked_for(client: TestClient) -> None:
    assert set(asked(client, "")) == {"model", "version", "predictions", "explanation", "timings"}


def test_a_set_of_labels_has_the_coverage_that_was_asked_or_the_next_that_is_known(client: TestClient) -> None:
    assert asked(client, "coverage=0.9")["prediction_set"] == {"coverage": 0.9, "labels": ["red"]}
    assert asked(client, "coverage=0.941")["prediction_set"] == {"coverage": 0.95, "labels": ["red", "green", "blue"]}
    assert "abstained" not in asked(client, "coverage=0.9")


def test_a_set_is_never_empty(client: TestClient) -> None:
    found = asked(client, "coverage=0.9", grey())  # no label reaches 0.5
    assert found["prediction_set"]["labels"] == [found["predictions"][0]["label"]]


def test_thresholds_of_classes_are_applied_each_to_its_own(client: TestClient) -> None:
    found = asked(client, "coverage=0.9&per_class=true")
    assert found["prediction_set"]["labels"] == ["red", "green", "blue"]  # blue had too few images: it is in every set
    assert asked(client, "coverage=0.8&per_class=true", picture("green"))["prediction_set"]["labels"] == ["green", "red"]


def test_it_abstains_where_it_is_not_sure_enough_for_the_precision(client: TestClient) -> None:
    sure, unsure = asked(client, "precision=0.9"), asked(client, "precision=0.9", grey())
    assert (sure["abstained"], sure["reason"]) == (False, None)
    assert (unsure["abstained"], unsure["reason"]) == (True, "unsure")
    assert asked(client, "abstain=true")["abstained"] is True  # at a precision of 0.95, for which 0.964 is too little
    assert asked(client, "abstain=false&coverage=0.9").keys() & {"abstained", "reason"} == set()


def test_what_is_unlike_anything_seen_is_said_so_however_sure_the_model_is(client: TestClient) -> None:
    known, unlike = (asked(client, "precision=0.9", picture(colour), "reds") for colour in ("red", "blue"))
    assert (known["abstained"], known["novelty"]) == (False, 0.0)
    assert (unlike["abstained"], unlike["reason"]) == (True, "unlike")
    assert unlike["novelty"] >= 0.95
    assert unlike["predictions"][0]["label"] == "blue"  # people may still want to see it


def test_several_images_are_each_answered_so(client: TestClient) -> None:
    files = [("images", ("a.png", picture("red"))), ("images", ("b.png", grey())), ("images", ("c.png", b"no image"))]
    answer = client.post("/predict", files=files, data={"precision": "0.9", "coverage": "0.9"}).json()
    results = [row["result"] for row in answer["data"]]
    assert [result and result["abstained"] for result in results] == [False, True, None]
    assert all("embedding" not in result for result in results if result)
    plain = client.post("/predict", files=files).json()
    assert "abstained" not in plain["data"][0]["result"]


@pytest.mark.parametrize(
    ("query", "field", "sentence"),
    [
        (
            "coverage=0.99",
            "coverage",
            "The 40 held-out images of this model are too few for a coverage of 0.99: the highest possible coverage is 0.95",
        ),
        (
            "precision=0.97",
            "precision",
            "The 40 held-out images of this model are too few for a precision of 0.97: the highest possible precision is "
            "0.95. Ask for "
            "less, or train with more validation images or with folds (data.folds)",
        ),
        ("coverage=0.99&per_class=1", "coverage", "coverage must be between 0.50 and 0.95 for each class"),
        ("per_class=1", "per_class", "per_class needs a coverage"),
    ],
)
def test_what_the_held_out_images_cannot_show_is_refused_in_a_sentence(
    client: TestClient, query: str, field: str, sentence: str
) -> None:
    answer = client.post(f"/predict?{query}", content=picture())
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert sentence in answer.json()["detail"]
    assert answer.json()["errors"][0]["field"].endswith(field)


@pytest.mark.parametrize("query", ["coverage=0.9", "abstain=true", "precision=0.9"])
def test_a_bundle_made_before_answers_such_a_request_with_one_clear_sentence(client: TestClient, query: str) -> None:
    answer = client.post(f"/v1/models/old/predict?{query}", content=picture())
    assert answer.status_code == 422
    assert "its bundle was made without calibration on held-out images" in answer.json()["detail"]
    assert asked(client, "", model="old")["predictions"][0]["label"] == "red"


@pytest.mark.parametrize("query", ["coverage=1", "coverage=0.2", "precision=nan", "coverage=much"])
def test_a_level_that_is_none_is_an_error_of_that_field(client: TestClient, query: str) -> None:
    answer = client.post(f"/predict?{query}", content=picture())
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].endswith(query.partition("=")[0])


def test_the_owner_switches_abstention_on_and_off_again(client: TestClient) -> None:
    place = "/v1/models/colours/versions/1"
    before = client.get(place).json()
    assert before["abstain_precision"] is None
    document = client.put(f"{place}/abstention", json={"precision": 0.9})
    assert (document.status_code, document.json()["abstain_precision"]) == (200, 0.9)
    assert document.json()["created"] == before["created"]
    until(lambda: "abstained" in client.post("/predict", content=grey()).json())
    assert client.post("/predict", content=grey()).json()["abstained"] is True
    assert client.post("/predict", content=picture("red")).json()["abstained"] is False
    assert "abstained" not in client.post("/predict?abstain=false", content=grey()).json()
    assert "It abstains by default, at a precision of 90%" in client.get(f"{place}/card").text
    client.put(f"{place}/abstention", json={"precision": None})
    until(lambda: "abstained" not in client.post("/predict", content=grey()).json())


def test_what_cannot_be_shown_cannot_be_switched_on(client: TestClient) -> None:
    refused = client.put("/v1/models/colours/versions/1/abstention", json={"precision": 0.98})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input")
    assert client.put("/v1/models/old/versions/1/abstention", json={"precision": 0.9}).status_code == 422
    assert client.put("/v1/models/colours/versions/7/abstention", json={"precision": 0.9}).status_code == 404


def test_the_card_of_a_version_is_markdown(client: TestClient) -> None:
    card = client.get("/v1/models/colours/versions/1/card")
    assert (card.status_code, card.headers["content-type"].partition(";")[0]) == (200, "text/markdown")
    assert card.text.startswith("---\npipeline_tag: image-classification\n")
    assert "# colours@1" in card.text
    assert "red, green, blue" in card.text
    assert "licence that is not recorded" in card.text
    assert client.get("/v1/models/colours/versions/2/card").status_code == 404


def test_our_client_asks_for_it_by_name(client: TestClient) -> None:
    ours = Client(str(client.base_url))
    ours.close()
    ours._connection.http = client  # which speaks to the application without a port
    found = ours.predict(picture("red"), coverage=0.9, per_class=True, precision=0.9)
    assert (found["prediction_set"]["labels"], found["abstained"]) == (["red", "green", "blue"], False)
    several = ours.predict_many([picture("red"), grey()], abstain=True)
    assert [row["result"]["abstained"] for row in several["data"]] == [True, True]
    assert "abstained" not in ours.predict(picture("red"), abstain=False)
