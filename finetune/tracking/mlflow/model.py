"""Log a bundle as an MLflow model: the bundle's files and an ``MLmodel`` file with two flavours.

``python_function`` predicts with the bundle's own decoder and preprocessing (`finetune.bundle.mlflow_model`); ``onnx`` is the
network alone. A model folder downloaded from MLflow is therefore also a bundle. Nothing is pickled.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.bundle import mlflow_model
from finetune.bundle.manifest import MANIFEST, MODEL, SELF_TEST, Manifest, read_manifest
from finetune.bundle.predictor import read_self_test
from finetune.distribution import DISTRIBUTION
from finetune.tracking.mlflow.names import key_text, value_text
from finetune.tracking.view import ModelView

BUNDLE_TAG = "finetune.bundle"  # digest of the bundle's files, which identifies a version independently of its number
VERSIONS_TAG = "mlflow.modelVersions"  # MLflow's page of a model links to the versions in this tag
USAGE = """Answers with the probabilities of the classes of an image:

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/NAME@champion")
model.predict(["some.jpg"])  # or bytes, base64, RGB arrays, a table with a column "image"
```

`mlflow models serve -m models:/NAME@champion --env-manager local` takes `{"inputs": ["<base64>"]}` on `/invocations`.
The artifacts are a bundle of finetune: `finetune predict some.jpg --model FOLDER` answers with them as well."""
REQUIRED = ("onnxruntime", "numpy", "pillow")  # packages that compute the predictions, pinned to the exact version


def bundle_digest(manifest: Manifest) -> str:
    """Return the digest of a bundle's file checksums, which identifies it independently of name and version."""
    listed = "\n".join(f"{name} {digest}" for name, digest in sorted(manifest.files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def log_model(
    client: Any, model: ModelView, experiment_id: str, run_id: str | None, params: Mapping[str, Any] | None = None
) -> str:
    """Log a bundle as a model, unless its experiment already has it; return the model's id in MLflow."""
    from mlflow.entities import LoggedModelOutput

    digest = bundle_digest(read_manifest(model.bundle))
    if (known := stored_model(client, [experiment_id], digest)) is not None:
        return known
    logged = client.create_logged_model(
        experiment_id,
        name=model.name,
        source_run_id=run_id,
        tags={BUNDLE_TAG: digest, "mlflow.note.content": USAGE.replace("NAME", model.name)},
        params={key_text(key): value_text(value) for key, value in (params or {}).items()},
        model_type="finetune bundle",
    )
    model_id = str(logged.model_id)
    with tempfile.TemporaryDirectory(prefix="finetune-mlflow-") as scratch:
        folder = Path(scratch) / "model"
        write_model(folder, model.bundle, model_id=model_id, run_id=run_id)
        client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return model_id


def stored_model(client: Any, experiment_ids: list[str], digest: str) -> str | None:
    """Return the id of a logged model with this bundle digest in these experiments, or None."""
    found = client.search_logged_models(experiment_ids, filter_string=f"tags.`{BUNDLE_TAG}` = '{digest}'", max_results=10)
    ready = [model.model_id for model in found if str(model.status) == "READY"]
    return str(ready[0]) if ready else None


def link_version(client: Any, model_id: str, name: str, number: str) -> None:
    """Record a registered version on the logged model, so that MLflow's page of the model links to it."""
    known = json.loads(client.get_logged_model(model_id).tags.get(VERSIONS_TAG, "[]"))
    version = {"name": name, "version": number}
    if version not in known:
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([*known, version])})


def write_model(folder: Path, bundle: Path, *, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write the bundle as a model folder that MLflow can load."""
    import mlflow.pyfunc
    from mlflow.models import Model

    manifest = read_manifest(bundle)
    described = Model(run_id=run_id, model_id=model_id)
    described.add_flavor(
        "onnx",
        onnx_version=version("onnx"),
        data=MODEL,
        providers=["CUDAExecutionProvider", "CPUExecutionProvider"],
        onnx_session_options=None,
        code=None,
    )
    with _requirements_unchecked():
        mlflow.pyfunc.save_model(
            path=str(folder),
            loader_module=mlflow_model.__name__,
            mlflow_model=described,
            signature=signature(mlflow_model.columns_of(manifest)),
            input_example=[example(bundle)],
            pip_requirements=[f"{DISTRIBUTION}=={__version__}", *(f"{name}=={version(name)}" for name in REQUIRED)],
            metadata={"classes": list(manifest.classes), "preprocess": manifest.preprocess.to_dict()},
        )
    for name in (*manifest.files, MANIFEST):
        shutil.copyfile(bundle / name, folder / name)
    described.model_size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    described.save(str(folder / "MLmodel"))


@contextlib.contextmanager
def _requirements_unchecked() -> Iterator[None]:
    """Keep MLflow in the block from comparing a model's requirements with the installed packages.

    The requirements are the versions of the installed packages, so the comparison finds nothing. It looks at every file of every
    installed package, which took 0.9 s of CPU time at the end of each run. MLflow has no option to leave it out.
    """
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    compare = getattr(environment, name, None)  # another version of MLflow may not have it
    if compare is None:
        yield
        return
    setattr(environment, name, lambda requirements: None)
    try:
        yield
    finally:
        setattr(environment, name, compare)


def signature(columns: Sequence[str]) -> Any:
    """Return the MLflow signature of the model's input and output.

    The signature is marked as inferred from type hints. MLflow then passes the input on unchanged instead of converting it to a
    table, which would reject paths and arrays. Over HTTP the input is ``{"inputs": [base64, …]}``.

    Args:
        columns: of the table of predictions.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    answer = Object([Property("label", DataType.string), Property("probability", DataType.double)])
    kinds = {
        "label": DataType.string,
        "probability": DataType.double,
        "predictions": Array(answer),
        "labels": Array(DataType.string),
        "prediction_set": Object([Property("coverage", DataType.double), Property("labels", Array(DataType.string))]),
        "abstained": DataType.boolean,
        "reason": DataType.string,
        "novelty": DataType.double,
    }
    found = ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema(
            [
                *(ColSpec(kinds[name], name) for name in columns),
                *(ColSpec(kinds[name], name, required=False) for name in mlflow_model.CERTAINTY),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("top_k", DataType.long, default=None),
                ParamSpec("coverage", DataType.double, default=None),
                ParamSpec("per_class", DataType.boolean, default=False),
                ParamSpec("abstain", DataType.boolean, default=None),
                ParamSpec("precision", DataType.double, default=None),
            ]
        ),
    )
    found._is_signature_from_type_hint = True
    return found


def example(bundle: Path) -> str:
    """Return an example input: a JPEG in base64 of one of the bundle's self-test images, as preprocessed."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(read_self_test(bundle / SELF_TEST).images[0]).save(stream, "JPEG", quality=90)
    return base64.b64encode(stream.getvalue()).decode("ascii")
