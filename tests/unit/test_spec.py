"""One request, three doors: what is accepted, and how everything that is wrong is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.batch_spec import BatchSpec
from finetune.comparison_spec import ArmSpec, ComparedRuns, ComparisonSettings
from finetune.errors import InvalidInput, NotFound, SpecError
from finetune.spec import (
    METHOD_SECTIONS,
    METHODS,
    Full,
    Hyperparameters,
    JobSpec,
    LinearProbe,
    Partial,
    Section,
    load_spec,
    parse_spec,
)
from finetune.spec_template import allowed_values, annotated_spec


def problems_of(given: dict) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(given)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_only_the_training_file_is_required_and_the_default_is_a_linear_probe_on_the_default_backbone():
    spec = parse_spec({"training_file": "photos"})
    assert spec.method == LinearProbe()
    assert spec.model.backbone == "tf_efficientnet_lite0"
    assert problems_of({}) == {"training_file": "required, and not given"}


def test_a_bare_name_stands_for_its_section():
    spec = parse_spec({"training_file": "photos", "model": "resnet18", "method": "full", "augmentation": "light"})
    assert spec.model.backbone == "resnet18"
    assert spec.method == Full()
    assert spec.augmentation.policy == "light"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_named_bare(name: str):
    assert parse_spec({"training_file": "photos", "method": name}).method.type == name


def test_an_abbreviation_or_another_tools_word_for_a_key_is_understood():
    found = problems_of(
        {
            "training_file": "photos",
            "hyperparameters": {"lr": 0.1},
            "model": {"imgsz": 224, "x": 1},
            "data": {"test": 0.2},
            "wd": 0.1,
            "epochs": 3,
            "test_fraction": 0.2,
        }
    )
    assert found == {
        "hyperparameters.lr": "unknown key. Did you mean 'learning_rate'?",
        "model.imgsz": "unknown key. Did you mean 'input_size_px'?",
        "model.x": "unknown key; allowed are backbone, weights, input_size_px, head",
        "data.test": "unknown key. Did you mean 'test_fraction'?",
        "wd": "unknown key. Did you mean 'hyperparameters.weight_decay'?",
        "epochs": "unknown key. Did you mean 'hyperparameters.n_epochs'?",
        "test_fraction": "unknown key. Did you mean 'data.test_fraction'?",
    }


def test_all_problems_are_reported_at_once_each_with_its_path_and_what_is_allowed():
    found = problems_of(
        {
            "training_file": 3,
            "sead": 1,
            "hyperparameters": {"n_epochs": "many", "batchsize": 8, "learning_rate": -1},
            "data": {"resize": "zoom", "input_size_px": 64},
            "n_epochs": 3,
            "model": {"head": {"dropout": 2}},
        }
    )
    assert found == {
        "training_file": "must be a text, given 3",
        "sead": "unknown key. Did you mean 'seed'?",
        "hyperparameters.n_epochs": "must be a whole number or 'auto', given 'many'",
        "hyperparameters.batchsize": "unknown key. Did you mean 'batch_size'?",
        "hyperparameters.learning_rate": "must be greater than 0 or 'auto', given -1",
        "data.input_size_px": "unknown key. Did you mean 'model.input_size_px'?",
        "n_epochs": "unknown key. Did you mean 'hyperparameters.n_epochs'?",
        "data.resize": "must be 'auto', 'crop', 'squash' or 'letterbox', given 'zoom'",
        "model.head.dropout": "must be less than 1 or 'auto', given 2",
    }


def test_a_misspelt_method_gets_the_allowed_ones_and_a_suggestion():
    message = problems_of({"training_file": "photos", "method": "partal"})["method"]
    assert "linear_probe, partial, full, gradual, auto" in message
    assert message.endswith("Did you mean 'partial'?")


def test_partial_takes_a_number_or_names_but_not_both():
    assert parse_spec({"training_file": "x", "method": {"type": "partial", "stages": 2}}).method == Partial(stages=2)
    names = parse_spec({"training_file": "x", "method": {"type": "partial", "train": ["layer4"]}}).method
    assert names == Partial(train=("layer4",))
    assert "not both" in problems_of({"training_file": "x", "method": {"type": "partial", "stages": 1, "train": ["a"]}})["method"]


@pytest.mark.parametrize(
    ("model", "where", "said"),
    [
        (5, "model", "must be a name or a section (a mapping of keys), given 5"),
        ("", "model", "must be a text of at least 1 character, given ''"),
        ({"a": 1}, "model.a", "unknown key; allowed are backbone, weights, input_size_px, head"),
        (
            "hf-hub:../../etc",
            "model",
            "'hf-hub:../../etc' is not of the form hf-hub:OWNER/NAME, as in hf-hub:timm/resnet18.a1_in1k",
        ),
    ],
)
def test_what_is_wrong_with_a_model_says_what_is_allowed(model: object, where: str, said: str) -> None:
    assert problems_of({"training_file": "x", "model": model}) == {where: said}


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "a/..", "a/b..c", "a--b/c", "/b", "a/", "a/b@../x", "a/b@", ".a/b", "a/b\n"])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str) -> None:
    (said,) = problems_of({"training_file": "x", "model": f"hf-hub:{name}"}).values()
    assert "is not of the form hf-hub:OWNER/NAME" in said


@pytest.mark.parametrize("name", ["timm/resnet18.a1_in1k", "a/b", "a/b@main", "a/b@refs/pr/1"])
def test_a_name_that_the_hub_can_have_is_a_backbone(name: str) -> None:
    assert parse_spec({"training_file": "x", "model": f"hf-hub:{name}"}).model.backbone == f"hf-hub:{name}"


def test_a_key_of_one_method_is_unknown_to_another():
    assert problems_of({"training_file": "x", "method": {"type": "linear_probe", "stages": 1}}) == {
        "method.stages": "unknown key; allowed is type"
    }


@pytest.mark.parametrize("given", [float("nan"), float("inf")])
def test_numbers_must_be_finite(given: float):
    assert list(problems_of({"training_file": "x", "hyperparameters": {"learning_rate": given}})) == [
        "hyperparameters.learning_rate"
    ]


def test_a_spec_never_changes_after_validation():
    spec = parse_spec({"training_file": "x"})
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 3  # type: ignore[misc]


def test_file_then_flags_then_settings_each_over_the_one_before(tmp_path: Path):
    path = tmp_path / "spec.yaml"
    path.write_text("training_file: a\nseed: 1\nmodel: resnet18\nhyperparameters: {n_epochs: 2, batch_size: 8}\n")
    spec = load_spec(path, {"seed": 2, "hyperparameters": {"n_epochs": 3}}, ["hyperparameters.n_epochs=4", "model.weights=none"])
    assert (spec.training_file, spec.seed) == ("a", 2)
    assert (spec.hyperparameters.n_epochs, spec.hyperparameters.batch_size) == (4, 8)
    assert (spec.model.backbone, spec.model.weights) == ("resnet18", "none")


def test_what_a_spec_writes_as_yaml_reads_back_as_the_same_spec():
    spec = parse_spec({"training_file": "x", "method": {"type": "partial", "train": ["layer4"]}, "metadata": {"who": "é"}})
    again = parse_spec(yaml.safe_load(spec.to_yaml()))
    assert again == spec
    assert again.digest() == spec.digest()
    assert parse_spec({"training_file": "x"}).digest() != spec.digest()


@pytest.mark.parametrize(("text", "said"), [("- a\n- b\n", "found list"), ("a: [", "not a YAML file"), ("", "found NoneType")])
def test_a_file_that_is_no_spec_says_so(tmp_path: Path, text: str, said: str):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        load_spec(path)


def test_a_missing_file_and_a_malformed_setting_say_what_to_give():
    with pytest.raises(NotFound, match="no such spec file"):
        load_spec(Path("nowhere.yaml"))
    with pytest.raises(SpecError, match=r"expected key\.path=value"):
        load_spec(None, {"training_file": "x"}, ["epochs"])


def test_the_json_schema_names_every_field():
    schema = JobSpec.model_json_schema()
    assert set(schema["properties"]) == set(JobSpec.model_fields)


def test_the_annotated_spec_holds_the_defaults_and_is_what_the_documentation_shows():
    text = annotated_spec()
    assert yaml.safe_load(text) == parse_spec({"training_file": "photos"}).model_dump(mode="json")
    assert max(map(len, text.splitlines())) <= 80
    assert f"```yaml\n{text}```" in (Path(__file__).parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")


def test_every_field_of_every_request_has_a_description_in_sentences():
    sections = [JobSpec, ComparisonSettings, ComparedRuns, ArmSpec, BatchSpec, *METHOD_SECTIONS.values()]
    for section in sections:  # grows while nested sections are found
        sections += [field.annotation for field in section.model_fields.values() if _is_section(field.annotation)]
        for name, field in section.model_fields.items():
            said = field.description or ""
            assert said.endswith((".", ")")), f"{section.__name__}.{name}: {said!r}"
    assert len(sections) > 15


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("seed", ["seed: 0"]),
        ("hyperparameters.l2", ["hyperparameters:", "  l2: auto"]),
        ("model.head.pooling", ["model:", "  head:", "    pooling: avg"]),
        ("method.stages", ["method:", "  # stages: null"]),
    ],
)
def test_one_field_can_be_printed_with_the_sections_around_it(key: str, lines: list[str]):
    shown = annotated_spec(key).splitlines()
    assert [line for line in shown if line in lines] == lines
    assert not [line for line in shown if line not in lines and not line.lstrip().startswith("# ")]


def test_a_field_that_does_not_exist_is_refused_with_the_nearest_ones():
    with pytest.raises(
        InvalidInput, match=r"data\.label_colum: no such field of the job spec\. Did you mean 'data\.label_column'"
    ):
        annotated_spec("data.label_colum")


def test_allowed_values_are_given_with_their_ranges():
    schema = Hyperparameters.model_json_schema()["properties"]
    assert allowed_values(schema["n_epochs"]) == "(auto | whole number, 1 to 10,000)"
    assert allowed_values(schema["label_smoothing"]) == "(auto | number, 0 to less than 1)"
    assert allowed_values(schema["l2"]) == "(auto | number, 0 or more)"
    assert allowed_values({"type": "string"}) == ""


@pytest.mark.parametrize(("folds", "allowed"), [(1, "greater than or equal to 2"), (51, "less than or equal to 50")])
def test_folds_are_two_to_fifty(folds: int, allowed: str):
    assert problems_of({"training_file": "x", "data": {"folds": folds}}) == {"data.folds": f"must be {allowed}, given {folds}"}


@pytest.mark.parametrize(
    ("given", "held_out", "refits"),
    [
        ({}, 0.15, False),
        ({"data": {"folds": 5}}, 0.0, True),
        ({"data": {"folds": 5, "test_fraction": 0.2}}, 0.2, True),
        ({"data": {"folds": 5}, "hyperparameters": {"refit": False}}, 0.0, False),
        ({"hyperparameters": {"refit": True}}, 0.15, True),
    ],
)
def test_with_folds_nothing_is_cut_off_for_testing_and_the_final_model_is_trained_on_everything(
    given: dict, held_out: float, refits: bool
):
    spec = parse_spec({"training_file": "photos", **given})
    assert (spec.data.held_out_fraction, spec.refits) == (held_out, refits)


@pytest.mark.parametrize("encoding", ["auto", "utf-8", "cp437", "CP932", "gbk", "shift_jis", "utf-16"])
def test_encodings_of_file_names_are_accepted(encoding: str) -> None:
    spec = parse_spec({"training_file": "photos", "data": {"name_encoding": encoding}})
    assert spec.data.name_encoding == encoding


@pytest.mark.parametrize("encoding", ["rot13", "hex", "undefined", "idna", "unicode_escape", "a\0b", "no-such", ""])
def test_what_is_no_encoding_of_file_names_is_refused(encoding: str) -> None:
    found = problems_of({"training_file": "photos", "data": {"name_encoding": encoding}})
    assert "is no encoding of file names; try utf-8" in found["data.name_encoding"]
