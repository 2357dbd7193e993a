"""A forgotten separator of labels is noticed, and separators come through every door as they were given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from folders import encoded

from finetune.data.check import check_images
from finetune.data.index import index_dataset
from finetune.data.separators import forgotten_separator
from finetune.data.split import split_dataset
from finetune.doctor.classes import class_findings, class_warnings
from finetune.errors import DataError, SpecError
from finetune.spec import load_spec, parse_spec


@pytest.mark.parametrize(
    ("labels", "separator"),
    [
        (["red|shirt", "blue|shirt"], "|"),
        (["red;shirt", "blue;shirt", "red;dress", "blue;dress"], ";"),
        (["red,shirt", "blue,shirt", "red,dress", "blue, dress"], ","),
        (["red", "red|shirt", "shirt", "blue|shirt"], "|"),
        (["red|shirt|old", "blue|shirt|new", "red|dress|new"], "|"),
        (["red", "blue", "green"], None),
        (["Paris, France", "Lyon, France", "Berlin, Germany", "Rome, Italy"], None),
        (["dog, golden", "cat"], None),
        (["a|b", "c|d"], None),  # no part is shared
        (["red|shirt", *"abcdefgh"], None),  # one of many
        (["|", "||"], None),
        ([], None),
    ],
)
def test_names_that_are_combinations_of_fewer_parts_are_recognised(labels: list[str], separator: str | None) -> None:
    found = forgotten_separator(labels)
    assert (found and found[0]) == separator
    if found:
        assert set(found[1]) == {label for label in labels if found[0] in label}


def table(folder: Path, counts: Mapping[str, int], *, missing: int = 0) -> Path:
    rows = ["file_name\tlabel"]
    for label, count in counts.items():
        for number in range(count):
            name = f"{len(rows)}.png"
            if number or not missing:
                (folder / name).write_bytes(encoded(f"{label}{number}"))
            rows.append(f"{name}\t{label}")
    path = folder / "labels.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_check_and_every_job_name_the_option(tmp_path: Path) -> None:
    data = split_dataset(check_images(index_dataset(table(tmp_path, {"red|shirt": 4, "blue|shirt": 4, "blue|dress": 4}))))
    (found,) = [one for one in class_findings(data) if one.kind == "combined_labels"]
    assert (found.severity, found.count) == ("doubt", 3)
    assert "3 of 3 classes ('blue|dress', 'blue|shirt', 'red|shirt') look like combinations of 4 labels" in found.evidence
    assert "--set 'data.label_separator=|'" in found.advice
    assert any("data.label_separator" in sentence for sentence in class_warnings(data))


def test_a_class_of_one_image_that_looks_like_a_combination_names_the_option_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        index_dataset(table(tmp_path, {"red;shirt": 1, "blue;shirt": 1, "blue;dress": 2}))
    said = [problem.message for problem in refused.value.problems]
    assert len([one for one in said if "has 1 image" in one]) == 2
    hint = "If 'blue;dress' is several labels of one image: --set 'data.label_separator=;'"
    assert len([one for one in said if hint in one]) == 1
    spec = load_spec(None, {"training_file": str(tmp_path / "labels.tsv")}, ["data.label_separator=;"])
    assert spec.data.label_separator == ";"


@pytest.mark.parametrize("given", ["|", ";", ",", ", ", "&", "#", "-", "*", "'|'", '";"', "::"])
def test_a_separator_is_taken_as_it_is_given_with_set(given: str) -> None:
    spec = load_spec(None, {"training_file": "x"}, [f"data.label_separator={given}"])
    assert spec.data.label_separator == given.strip().strip("'\"")


def test_settings_that_yaml_means_are_still_yaml() -> None:
    spec = load_spec(None, {"training_file": "x"}, ["data.label_separator=", "data.splits={}", "data.file_column=~"])
    assert (spec.data.label_separator, spec.data.splits, spec.data.file_column) == (None, {}, None)


def test_what_yaml_makes_of_a_bare_separator_in_a_file_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("training_file: x\ndata:\n  label_separator: |\n")
    with pytest.raises(
        SpecError, match=r"label_separator: an empty text separates nothing; in a YAML file, put the separator into"
    ):
        load_spec(tmp_path / "spec.yaml")
    assert parse_spec({"training_file": "x", "data": {"label_separator": "|"}}).data.label_separator == "|"


def test_files_that_a_table_names_and_that_do_not_exist_are_called_missing(tmp_path: Path) -> None:
    path = table(tmp_path, {"ash": 3, "beech": 3}, missing=1)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 of 6 images do not exist and 1 cannot be read, more than data.max_bad_fraction"):
        check_images(index_dataset(path))
    data = check_images(index_dataset(path), max_bad_fraction=0.9)
    assert [one.is_missing for one in data.bad].count(True) == 2
