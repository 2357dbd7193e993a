"""OpenAPI schemas of the bodies that create jobs and comparisons, including the fields of the stock client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.comparison_spec import ComparedRuns, ComparisonSettings
from finetune.spec import JobSpec

_REFERENCES = "#/components/schemas/{model}"
_NULLABLE = ("seed", "suffix", "metadata", "hyperparameters", "validation_file", "test_file")


def _job_schemas() -> dict[str, Any]:
    """Return `JobCreate` and the schemas that it refers to, for the components of the OpenAPI document."""
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
    for field in properties.values():  # descriptions stay where readers of the document look for them
        described = [option for option in field.get("anyOf", ()) if "description" in option]
        if described and "description" not in field:
            field["description"] = described[0]["description"]
    properties["integrations"] = {"anyOf": [{"type": "array", "items": {"type": "object"}, "maxItems": 0}, {"type": "null"}]}
    definitions["SupervisedMethod"] = {
        "type": "object",
        "description": "The value that the stock client sends: the default method of this server.",
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


def _comparison_schemas(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas of the two bodies that create a comparison."""
    settings = ComparisonSettings.model_json_schema(ref_template=_REFERENCES)
    runs = ComparedRuns.model_json_schema(ref_template=_REFERENCES)
    definitions = settings.pop("$defs")
    for properties in (settings["properties"], runs["properties"]):
        for field in properties.values():
            field.pop("title", None)
    runs["properties"]["runs"] |= {"description": "Ids of your fine-tuning jobs that have succeeded."}
    description = "A job spec that all arms share, and the settings in which they differ (docs/comparison.md)."
    create = {
        **job,
        "title": "ComparisonCreate",
        "description": description,
        "properties": {**job["properties"], **settings["properties"]},
    }
    return {**definitions, "ComparisonCreate": create, "RunsComparisonCreate": {**runs, "title": "RunsComparisonCreate"}}


JOB_SCHEMAS = _job_schemas()
JOB_SCHEMAS |= _comparison_schemas(JOB_SCHEMAS["JobCreate"])
JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A job spec (docs/spec.md). The `method` of type `supervised` of the stock client is accepted too.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobCreate"}}},
    }
}
COMPARISON_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A job spec with the settings in which the arms differ (docs/comparison.md), or finished jobs to compare.",
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/ComparisonCreate"},
                        {"$ref": "#/components/schemas/RunsComparisonCreate"},
                    ]
                }
            }
        },
    }
}
