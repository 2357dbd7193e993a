"""Models are named after their data, and two kinds of data never share a name by accident."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.naming import LONGEST_NAME, as_model_name, dataset_name, model_name
from finetune.spec import SUFFIX_PATTERN


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("photos", "photos"),
        ("My Photos (2024)", "my-photos-2024"),
        ("Blumen & Bäume", "blumen-baume"),
        ("façade_v1.2", "facade-v1-2"),
        ("--x--", "x"),
    ],
)
def test_a_name_is_what_a_person_would_type(folder: str, name: str) -> None:
    assert as_model_name(folder) == name


@pytest.mark.parametrize("folder", ["照片", "данные", "صور", "ภาพถ่าย", "cats 猫", "cats 犬", "ß", "…", "\udce9\udcff"])
def test_letters_of_another_script_are_told_apart_by_a_digest(folder: str) -> None:
    name = as_model_name(folder)
    assert re.fullmatch(r"(model|cats|ss)-[0-9a-f]{8}", name), name
    assert as_model_name(folder) == name
    assert as_model_name(f"{folder}x") != name


@given(st.text(max_size=200))
def test_any_text_makes_a_name_that_a_model_may_have(text: str) -> None:
    name = as_model_name(text)
    assert re.fullmatch(SUFFIX_PATTERN, name), name
    assert len(name) <= LONGEST_NAME


@given(
    st.text(st.characters(categories=("Lo",)), min_size=1, max_size=20), st.text(st.characters(categories=("Lo",)), min_size=1)
)
def test_names_in_scripts_without_latin_letters_never_collide(one: str, other: str) -> None:
    assert (as_model_name(one) == as_model_name(other)) == (one == other)


def test_what_was_asked_for_wins() -> None:
    assert model_name("flowers", "photos") == "flowers"
    assert model_name(None, "My photos") == "my-photos"


def test_a_dataset_is_called_after_its_folder_or_its_table(tmp_path: Path) -> None:
    folder = tmp_path / "photos.v2"
    folder.mkdir()
    (folder / "labels.train.csv").touch()
    (tmp_path / "latest").symlink_to(folder)
    assert dataset_name(folder) == "photos.v2"
    assert dataset_name(folder / "labels.train.csv") == "labels.train"
    assert dataset_name(tmp_path / "latest") == "photos.v2"
    assert dataset_name(tmp_path / "not there yet") == "not there yet"
    assert dataset_name(tmp_path / "clothes" / "Train") == "clothes"
