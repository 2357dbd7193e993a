"""What HTTP answers is what the predictor says, to the last bit, on real photographs."""

from __future__ import annotations

from pathlib import Path

from serving import in_process, registered
from standin import write_bundle

from finetune.bundle.predictor import Predictor


def test_http_answers_for_real_photographs_equal_the_predictors(photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "validation").glob("*/*"))[::12]
    assert len(files) >= 20
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    predictor = Predictor.load(tmp_path / "models" / "colours" / "1")
    with in_process(tmp_path) as client:
        for file in files:
            data = file.read_bytes()
            expected = list(predictor.predict(data).labels)
            for sent in ({"content": data}, {"files": {"image": (file.name, data, "image/jpeg")}}):
                rows = client.post("/predict", **sent).json()["predictions"]
                assert [(row["label"], row["probability"]) for row in rows] == expected, file.name
