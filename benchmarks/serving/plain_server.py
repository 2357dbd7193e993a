"""What a tutorial would have one write: FastAPI, Pillow and ONNX Runtime with their defaults. Takes the model file from MODEL."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI, UploadFile
from PIL import Image

app = FastAPI()
session = onnxruntime.InferenceSession(os.environ["MODEL"])
(given,) = session.get_inputs()
SIDE = int(given.shape[1])


@app.post("/predict")
def predict(image: UploadFile) -> list[dict[str, Any]]:
    picture = Image.open(io.BytesIO(image.file.read())).convert("RGB").resize((SIDE, SIDE))
    (probs,) = session.run(["probs"], {given.name: np.asarray(picture)[None]})
    best = np.argsort(-probs[0])[:5]
    return [{"label": int(index), "probability": float(probs[0, index])} for index in best]


@app.get("/readyz")
def ready() -> dict[str, str]:
    return {"status": "ok", "model": Path(os.environ["MODEL"]).name}
