"""The body of a job's creation as the OpenAPI document shows it: the JobSpec's own schema, and what the stock client may send."""

from __future__ import annotations

from typing import Any

from finetune.spec import JobSpec

_REFERENCES = "#/components/schemas/{model}"
_NULLABLE = ("seed", "suffix", "metadata", "hyperparameters", "validation_file", "test_file")


def _job_schemas() -> dict[str, Any]:
    """Schemas for the components of the document: `JobCreate` and what it refers to."""
    schema = JobSpec.model_json_schema(ref_template=_REFERENCES)
    definitions: dict[str, Any] = schema.pop("$defs")
    properties = schema["properties"]
    properties["training_file"] |= {"description": "The id of an uploaded file, or a dataset folder of the server."}
    properties["model"] = {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 200}, properties["model"]]}
    properties["augmentation"] = {"anyOf": [{"enum": ["none", "light", "default", "strong"]}, properties["augmentation"]]}
    properties["method"] = {
        "anyOf": [
            {"enum": ["linear_probe", "partial", "full", "gradual", "auto", "supervised"]},
            {key: value for key, value in properties["method"].items() if key != "default"},
            {"$ref": _REFERENCES.format(model="SupervisedMethod")},
            {"type": "null"},
        ]
    }
    for name in _NULLABLE:
        if "anyOf" not in properties[name]:
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    properties["integrations"] = {"anyOf": [{"type": "array", "items": {"type": "object"}, "maxItems": 0}, {"type": "null"}]}
    definitions["SupervisedMethod"] = {
        "type": "object",
        "description": "What the stock client sends: the method that is the default here.",
        "required": ["type"],
        "additionalProperties": False,
        "properties": {
            "type": {"const": "supervised"},
            "supervised": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"hyperparameters": {"$ref": _REFERENCES.format(model="Hyperparameters")}},
            },
        },
    }
    return {**definitions, "JobCreate": {**schema, "title": "JobCreate"}}


JOB_SCHEMAS = _job_schemas()
JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A JobSpec (docs/spec.md); the stock client's `method` of type `supervised` is understood too.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobCreate"}}},
    }
}
