"""Folders as people pack and name them: what is a class, what a split, what only lies around them. In every place alike."""

from __future__ import annotations

import io
import itertools
import shlex
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from folders import encoded

from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.reading import Reading
from finetune.data.splits_by_name import split_meaning
from finetune.errors import DataError

Files = Mapping[str, int]  # folder -> how many images


def members(files: Files) -> dict[str, bytes]:
    return {f"{folder}/{n}.png": encoded(f"{folder}/{n}") for folder, count in files.items() for n in range(count)}


def as_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "data"


def as_zip(root: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(root / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root / "data.zip"


def as_tar(root: Path, files: Mapping[str, bytes], mode: str = "w", ending: str = "tar") -> Path:
    with tarfile.open(root / f"data.{ending}", mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return root / f"data.{ending}"


def as_tar_gz(root: Path, files: Mapping[str, bytes]) -> Path:
    return as_tar(root, files, "w:gz", "tar.gz")


PLACES: tuple[Callable[[Path, Mapping[str, bytes]], Path], ...] = (as_folder, as_zip, as_tar, as_tar_gz)


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def place(request: pytest.FixtureRequest) -> Callable[[Path, Mapping[str, bytes]], Path]:
    return request.param  # type: ignore[no-any-return]


def told(error: DataError) -> str:
    return " | ".join(problem.message for problem in error.problems)


FOREIGN: tuple[Files, ...] = (
    {"entraînement": 2, "validation": 1},
    {"Trainieren": 2, "Validierung": 1},
    {"Trainingsdaten": 2, "Validierungsdaten": 1},
    {"обучение": 2, "валидационный": 1},
    {"訓練データ": 2, "検証データ": 1},
    {"训练集": 2, "验证集": 1},
    {"eğitim": 2, "doğrulama": 1},
)


@pytest.mark.parametrize("names", FOREIGN, ids=lambda names: next(iter(names)))
def test_splits_in_other_languages_are_taken_for_splits_where_the_same_classes_lie_in_them(names: Files, tmp_path: Path) -> None:
    files = {f"{name}/{label}": count for name, count in names.items() for label in ("cat", "dog")}
    dataset = index_dataset(as_zip(tmp_path, members(files)))
    assert dataset.counts() == {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    train, val = names
    assert f"splits: {train}/ is train, {val}/ is val" in dataset.understood


def test_words_for_splits_in_other_languages_are_classes_where_images_lie_in_them_beside_others(tmp_path: Path) -> None:
    dataset = index_dataset(as_folder(tmp_path, members({"prueba": 2, "cat": 2, "dog": 2})))
    assert dataset.classes == ("cat", "dog", "prueba")


def test_the_question_proposes_an_answer_that_can_be_pasted(tmp_path: Path) -> None:
    files = members({f"{name}/{label}": 2 for name in ("site a: new", "validation") for label in ("cat", "dog")})
    with pytest.raises(DataError) as caught:
        index_dataset(as_folder(tmp_path, files))
    _, flag = next(part for part in itertools.pairwise(shlex.split(told(caught.value))) if part[0] == "--set")
    assert flag == 'data.splits={"site a: new": train, validation: val}'
    answer = yaml.safe_load(flag.partition("=")[2])
    assert index_dataset(tmp_path / "data", reading=Reading(splits=answer)).sizes() == {"train": 4, "val": 4}


def test_a_single_picture_is_answered_with_what_is_read_and_what_predicts(tmp_path: Path) -> None:
    (tmp_path / "my cat.png").write_bytes(encoded("cat"))
    with pytest.raises(
        DataError, match=r"cat\.png: is a single picture\. Give a folder .* finetune predict '.*my cat\.png' --model NAME"
    ):
        index_dataset(tmp_path / "my cat.png")


UNDERSTOOD: dict[str, tuple[Files, dict[str, dict[str, int]], str]] = {
    "one folder around": ({"photos/cat": 2, "photos/dog": 2}, {"all": {"cat": 2, "dog": 2}}, "photos/, was left out"),
    "a chain of folders around": ({"a/b/c/d/cat": 2, "a/b/c/d/dog": 2}, {"all": {"cat": 2, "dog": 2}}, "a/b/c/d/, was left out"),
    "splits by other names": (
        {"training_set/cat": 2, "training_set/dog": 2, "test_set/cat": 1, "test_set/dog": 1},
        {"train": {"cat": 2, "dog": 2}, "test": {"cat": 1, "dog": 1}},
        "training_set/ is train",
    ),
    "splits within a folder": (
        {"set/Train/cat": 2, "set/Train/dog": 2, "set/Valid/cat": 1, "set/Valid/dog": 1},
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}},
        "set/, was left out",
    ),
    "splits nested twice": (
        {f"{name}/{name}/{label}": 2 for name in ("training_set", "test_set") for label in ("cat", "dog")},
        {"train": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 2}},
        "the folder around the classes of train",
    ),
    "splits with a word of the makers": (
        {f"{name}/{name}/{label}": 2 for name in ("seg_train", "seg_test") for label in ("cat", "dog")},
        {"train": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 2}},
        "were taken for splits",
    ),
    "numbered splits": (
        {f"{name}/{label}": 2 for name in ("train2017", "val2017") for label in ("cat", "dog")},
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 2, "dog": 2}},
        "train2017/ is train",
    ),
    "splits inside classes": (
        {f"{label}/{name}": count for name, count in (("train", 2), ("val", 1)) for label in ("cat", "dog")},
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}},
        "each class folder holds splits",
    ),
    "a folder of system files": (
        {"cat": 2, "dog": 2, "@eaDir": 1, "lost+found": 1, ".ipynb_checkpoints": 1, "System Volume Information": 1},
        {"all": {"cat": 2, "dog": 2}},
        "left out, as systems or programs create them: .ipynb_checkpoints, @eaDir, System Volume Information, lost+found",
    ),
    "folders inside classes": (
        {"animal/cat": 2, "animal/dog": 2, "vehicle/car": 2, "vehicle/bus": 2},
        {"all": {"animal": 4, "vehicle": 4}},
        "data.class_folder=last",
    ),
    "a test folder without labels": (
        {"train/cat": 2, "train/dog": 2, "test": 3},
        {"train": {"cat": 2, "dog": 2}},
        "3 images without class folders, so without labels, left out",
    ),
    "a class that is called like a split": ({"train": 2, "plane": 2, "car": 2}, {"all": {"car": 2, "plane": 2, "train": 2}}, ""),
    "classes with a split's word in them": (
        {"bullet_train": 2, "test_tube": 2, "car": 2},
        {"all": {"bullet_train": 2, "car": 2, "test_tube": 2}},
        "",
    ),
}


@pytest.mark.parametrize("what", UNDERSTOOD)
def test_what_people_pack_is_understood_and_said(
    what: str, place: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    files, counts, said = UNDERSTOOD[what]
    dataset = index_dataset(place(tmp_path, members(files)))
    assert dataset.counts() == counts
    assert said in " | ".join((*dataset.understood, *dataset.warnings))
    assert len({sample.id for sample in dataset.samples}) == len(dataset.samples)


def test_the_same_files_in_every_place_are_the_same_samples(tmp_path: Path) -> None:
    files = members({"photos/training_set/cat": 2, "photos/training_set/dog": 2, "photos/dev/cat": 1, "photos/dev/dog": 1})
    datasets = [index_dataset(place(tmp_path, files)) for place in PLACES]
    assert len({tuple((sample.id, sample.target, sample.split, sample.read()) for sample in d.samples) for d in datasets}) == 1
    assert len({dataset.understood for dataset in datasets}) == 1
    assert {dataset.name for dataset in datasets} == {"data"}


ASKED: dict[str, tuple[Files, str, Reading, dict[str, dict[str, int]]]] = {
    "the same folders in each of two": (
        {"site_a/cat": 2, "site_a/dog": 2, "site_b/cat": 1, "site_b/dog": 2},
        "the same folders (cat, dog) lie in each of site_a, site_b",
        Reading(class_folder="last"),
        {"all": {"cat": 3, "dog": 4}},
    ),
    "and they are the classes": (
        {"site_a/cat": 2, "site_a/dog": 2, "site_b/cat": 1, "site_b/dog": 2},
        "data.class_folder=first takes site_a, site_b",
        Reading(class_folder="first"),
        {"all": {"site_a": 4, "site_b": 3}},
    ),
    "and they are splits": (
        {"site_a/cat": 2, "site_a/dog": 2, "site_b/cat": 1, "site_b/dog": 2},
        "If those are splits, say what each is, for example --set 'data.splits={site_a: train, site_b: val}'",
        Reading(splits={"site_a": "train", "site_b": "test"}),
        {"train": {"cat": 2, "dog": 2}, "test": {"cat": 1, "dog": 2}},
    ),
    "splits with images directly in them": (
        {"train": 2, "test": 2},
        "are they classes?",
        Reading(splits={"train": "class", "test": "class"}),
        {"all": {"test": 2, "train": 2}},
    ),
    "half of the names": (
        {"old_train/cat": 2, "old_train/dog": 2, "test_tubes/small": 2, "test_tubes/large": 2},
        "but their contents do not confirm it",
        Reading(splits={"old_train": "class", "test_tubes": "class"}),
        {"all": {"old_train": 4, "test_tubes": 4}},
    ),
    "a test folder beside the classes": (
        {"cat": 2, "dog": 2, "test/cat": 1, "test/dog": 1},
        "they may be splits or classes",
        Reading(splits={"test": "test"}),
        {"test": {"cat": 1, "dog": 1}, "all": {"cat": 2, "dog": 2}},
    ),
    "a folder that is nothing of all that": (
        {"train/cat": 2, "train/dog": 2, "extra/cat": 1},
        "data.splits={extra: none}' leaves it out",
        Reading(splits={"extra": "none"}),
        {"train": {"cat": 2, "dog": 2}},
    ),
    "two folders for one split": (
        {"train/cat": 2, "train/dog": 2, "dev/cat": 1, "dev/dog": 1, "valid/cat": 1, "valid/dog": 1},
        "dev/ and valid/ both mean val",
        Reading(splits={"valid": "test"}),
        {"train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 1}, "test": {"cat": 1, "dog": 1}},
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_where_nothing_is_certain_it_asks_and_takes_the_answer(
    what: str, place: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    files, asked, answer, counts = ASKED[what]
    location = place(tmp_path, members(files))
    with pytest.raises(DataError) as caught:
        index_dataset(location)
    assert asked in told(caught.value)
    assert index_dataset(location, reading=answer).counts() == counts


@pytest.mark.parametrize(
    ("name", "split", "certain"),
    [
        ("train", "train", True),
        ("Training Set", "train", True),
        ("trainingSet", "train", True),
        ("TEST_IMAGES", "test", True),
        ("valdata", "val", True),
        ("val2017", "val", True),
        ("1-dev", "val", True),
        ("hold-out", None, None),
        ("holdout", "test", True),
        ("seg_train", "train", False),
        ("train_station", "train", False),
        ("train_test", None, None),
        ("trainers", None, None),
        ("valley", None, None),
        ("testament", None, None),
        ("cat", None, None),
        ("", None, None),
        ("٣", None, None),
    ],
)
def test_what_a_name_says_of_a_split(name: str, split: str | None, certain: bool | None) -> None:
    meaning = split_meaning(name, {})
    assert (None if meaning is None else (meaning.split, meaning.certain)) == (None if split is None else (split, certain))


def test_images_without_an_ending_are_known_by_their_first_bytes(
    place: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    files = {f"{label}/{n}": encoded(f"{label}{n}") for label in ("cat", "dog") for n in range(3)}
    files |= {"cat/README": b"just words", "cat/IMG.0001": encoded("another"), "dog/empty": b""}
    dataset = index_dataset(place(tmp_path, files))
    assert dataset.counts() == {"all": {"cat": 4, "dog": 3}}
    (warning,) = dataset.warnings
    assert warning.startswith("2 files not named like an image, left out: ")


def test_names_in_many_scripts_are_kept_to_the_letter(place: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path) -> None:
    names = ("گربه‌ها", "क्‍ष", "👩‍🚀", "क़", "café", "v1.0.", "007", "1.0", "nan", "null", "ﬁn")
    dataset = index_dataset(place(tmp_path, members(dict.fromkeys(names, 2))))
    assert dataset.classes == tuple(sorted(names))
    assert not dataset.understood


@pytest.mark.parametrize("name", ["a\u202eb", "a\u2066b", "a\x1bb", "a\nb", "a\u2028b", "a\ufeffb"])
def test_names_that_turn_or_control_what_shows_them_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="control or direction") as caught:
        index_dataset(as_folder(tmp_path, members({name: 2, "b": 2, "c": 2})))
    assert name not in str(caught.value)
    with pytest.raises(DataError, match="control or direction"):
        index_dataset(as_zip(tmp_path, members({name: 2, "b": 2})))


def test_files_whose_names_differ_by_case_are_two_files(
    place: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    files = members({"cat": 2, "dog": 2}) | {"cat/IMG_1.png": encoded("one"), "cat/img_1.png": encoded("two")}
    assert index_dataset(place(tmp_path, files)).counts() == {"all": {"cat": 4, "dog": 2}}


def test_long_names_are_read(place: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path) -> None:
    files = {f"{label}/{'n' * 130}{n}.png": encoded(f"{label}{n}") for label in ("cat", "dog") for n in range(2)}
    assert index_dataset(place(tmp_path, files)).counts() == {"all": {"cat": 2, "dog": 2}}


def test_the_order_of_samples_is_that_of_names_everywhere(tmp_path: Path) -> None:
    files = members({"b": 3, "a": 3})
    for place in PLACES:
        ids = [sample.id for sample in index_dataset(place(tmp_path, dict(reversed(files.items())))).samples]
        assert ids == sorted(ids)


def test_a_dataset_of_an_archive_says_where_a_file_is(tmp_path: Path) -> None:
    dataset: Dataset = index_dataset(as_zip(tmp_path, members({"photos/cat": 2, "photos/dog": 2})))
    assert [str(sample.file) for sample in dataset.samples][:1] == [f"{tmp_path}/data.zip/photos/cat/0.png"]
