"""A table of files and labels: which columns are meant, labels kept to the letter, and every wrong row named."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import encoded

from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.errors import DataError


def write_table(folder: Path, text: str | bytes, n_images: int = 6, name: str = "labels.csv") -> Path:
    """A table beside ``images/0.png`` …"""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(n_images):
        (folder / "images" / f"{number}.png").write_bytes(encoded(f"image {number}"))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def rows_of(*labels: str, header: str = "file_name,label") -> str:
    return "\n".join([header, *(f"images/{number}.png,{label}" for number, label in enumerate(labels))]) + "\n"


def problems_of(table: Path) -> dict[str, str]:
    with pytest.raises(DataError) as caught:
        index_dataset(table)
    return {problem.where.removeprefix(f"{table}, "): problem.message for problem in caught.value.problems}


def labels_of(dataset: Dataset) -> list[str]:
    return [dataset.label_text(sample) for sample in sorted(dataset.samples, key=lambda sample: sample.id)]


@pytest.mark.parametrize("file", ["file_name", "filename", "file", "path", "image", "Image_Path", " file "])
@pytest.mark.parametrize("label", ["label", "Class", "category", "TARGET"])
def test_the_columns_are_found_by_the_names_that_people_give_them(tmp_path: Path, file: str, label: str) -> None:
    table = write_table(tmp_path, rows_of("a", "b", "a", "b", header=f"{file},{label}"), 4)
    assert labels_of(index_dataset(table)) == ["a", "b", "a", "b"]


def test_columns_may_come_in_any_order_beside_others(tmp_path: Path) -> None:
    text = "id,label,notes,file\n1,a,,images/0.png\n2,b,x,images/1.png\n3,a,,images/2.png\n4,b,,images/3.png\n"
    assert labels_of(index_dataset(write_table(tmp_path, text))) == ["a", "b", "a", "b"]


def test_a_tab_separated_table_is_read_by_its_ending(tmp_path: Path) -> None:
    text = rows_of("a, b", "c", "a, b", "c").replace(".png,", ".png\t").replace("file_name,", "file_name\t")
    assert labels_of(index_dataset(write_table(tmp_path, text, name="labels.TSV"))) == ["a, b", "c", "a, b", "c"]


def test_labels_stay_the_text_that_they_are(tmp_path: Path) -> None:
    labels = ["007", "null", "NA", "1e5", "true", "7", "007", "null", "NA", "1e5", "true", "7"]
    dataset = index_dataset(write_table(tmp_path, rows_of(*labels), 12))
    assert dataset.classes == ("007", "1e5", "7", "NA", "null", "true")
    assert sorted(labels_of(dataset)) == sorted(labels)


def test_space_around_a_label_is_nobody_s_intention_and_quotes_are_taken_off(tmp_path: Path) -> None:
    text = 'file_name,label\nimages/0.png, a\nimages/1.png,"b, ""c"""\nimages/2.png,a \nimages/3.png,"b, ""c"""\n'
    assert labels_of(index_dataset(write_table(tmp_path, text))) == ["a", 'b, "c"', "a", 'b, "c"']


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + rows_of("a", "b", "a", "b").replace("\n", "\r\n").encode()
    assert labels_of(index_dataset(write_table(tmp_path, text))) == ["a", "b", "a", "b"]


@pytest.mark.parametrize("header", ["split", "Split", " SPLIT "])
def test_splits_are_those_of_the_column(tmp_path: Path, header: str) -> None:
    text = rows_of("a,train", "b,Training", "a,train", "b,train", "a,valid", "b,test", header=f"file_name,label,{header}")
    dataset = index_dataset(write_table(tmp_path, text))
    assert dataset.sizes() == {"train": 4, "val": 1, "test": 1}


def test_rows_without_a_split_are_divided_where_only_test_images_are_named(tmp_path: Path) -> None:
    text = rows_of("a,", "b,", "a,", "b,", "a,test", "b,test", header="file_name,label,split")
    assert index_dataset(write_table(tmp_path, text)).sizes() == {"test": 2, "all": 4}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("file_name,kind", "no column for the label; name one of them label (the columns are file_name, kind)"),
        ("photo,label", "no column for the image file; name one of them file_name (the columns are photo, label)"),
        ("file,image,label", "several columns may hold the image file: file, image; name one of them file_name"),
        ("file,label,class", "several columns may hold the label: label, class; name one of them label"),
        ("file,label,label", "several columns may hold the label: label, label"),
    ],
)
def test_columns_that_are_missing_or_doubtful_are_asked_for(tmp_path: Path, header: str, says: str) -> None:
    found = problems_of(write_table(tmp_path, f"{header}\nimages/0.png,a,a\n"))
    assert any(message.startswith(says) for message in found.values()), found


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    assert list(problems_of(write_table(tmp_path, "file_name,label\n")).values()) == ["has a header and no rows"]
    assert "the columns are none" in " ".join(problems_of(write_table(tmp_path, "")).values())


def test_every_wrong_row_is_named_at_once(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "file_name,label,split",
            "images/0.png,a,train",
            "images/gone.png,a,train",
            "images/1.png,,train",
            ",b,train",
            "images/2.png,b,holdout",
            "images/3.png,b,train,more",
            "images/0.png,b,train",
            "images/0.png,a,test",
            "images/4.png,b,train",
            "images/5.png,a,train",
            "images/1.png,b,train",
        ]
    )
    assert problems_of(write_table(tmp_path, text)) == {
        "row 3": f"{tmp_path}/images/gone.png: no such file; paths are relative to the table",
        "row 4": "has no label",
        "row 5": "has no file_name",
        "row 6": "split 'holdout' is not one of train, val and test",
        "row 7": "has more fields than the header; put quotes around a name with a separator in it",
        "row 8": "images/0.png has the label 'b' here and 'a' in row 2",
        "row 9": "images/0.png has the split 'test' here and 'train' in row 2",
    }


def test_a_row_that_says_the_same_again_counts_once(tmp_path: Path) -> None:
    text = rows_of("a", "b", "a", "b") + "./images/0.png,a\nimages/1.png,b\n"
    dataset = index_dataset(write_table(tmp_path, text))
    assert len(dataset.samples) == 4
    assert dataset.warnings == (f"{tmp_path}/labels.csv: 2 rows that repeat another one, left out",)


def test_labels_that_no_terminal_can_show_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows_of("a", "b", "a", "b").encode() + b"images/4.png,caf\xe9\nimages/5.png,a\x07\n")
    assert problems_of(table) == dict.fromkeys(
        ("row 6", "row 7"), "a label with undecodable bytes or control characters; save the table as UTF-8"
    )


def test_what_the_reader_of_tables_cannot_read_is_told_with_its_line(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows_of("a", "b") + f'images/2.png,"{"x" * 200_000}"\n')
    (found,) = [message for message in problems_of(table).values() if "cannot be read as a table" in message]
    assert "field larger than field limit" in found


def test_a_table_of_nothing_but_test_images_is_not_trained_on(tmp_path: Path) -> None:
    text = rows_of("a,test", "b,test", header="file_name,label,split")
    table = write_table(tmp_path, text)
    assert list(problems_of(table).values()) == ["nothing to train on: all of it is for validation or testing"]
    assert index_dataset(table, for_training=False).sizes() == {"test": 2}
