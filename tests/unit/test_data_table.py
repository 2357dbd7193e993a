"""A table of files and labels: which columns are meant, labels kept to the letter, and every wrong row named."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import encoded

from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.reading import Columns, Reading
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
        (
            "file_name,kind,notes",
            "no column for the label; name it with --set data.label_column=NAME (its columns are file_name, kind, notes)",
        ),
        ("file,label,class", "several columns may hold the label: label, class; name it with --set data.label_column=NAME"),
        ("file,label,label", "the column 'label' occurs more than once"),
    ],
)
def test_columns_that_are_missing_or_doubtful_are_asked_for(tmp_path: Path, header: str, says: str) -> None:
    rows = "".join(f"images/{number}.png,{label},{label}\n" for number, label in enumerate("abab"))
    with pytest.raises(DataError) as caught:
        index_dataset(write_table(tmp_path, f"{header}\n{rows}"))
    assert says in str(caught.value)


@pytest.mark.parametrize("header", ["photo,label,n", "a,label,n", "n,label,image"])
def test_where_names_do_not_tell_the_contents_do(tmp_path: Path, header: str) -> None:
    rows = "".join(f"images/{number}.png,{label},{label}\n" for number, label in enumerate("abab"))
    if header.endswith("image"):
        rows = "".join(f"x,{label},images/{number}.png\n" for number, label in enumerate("abab"))
    assert labels_of(index_dataset(write_table(tmp_path, f"{header}\n{rows}"))) == ["a", "b", "a", "b"]


def test_columns_are_found_by_what_is_in_them_and_then_that_is_said(tmp_path: Path) -> None:
    rows = "".join(f"{number},images/{number}.png,{label}\n" for number, label in enumerate("abab"))
    with pytest.raises(DataError, match="no column for the label"):
        index_dataset(write_table(tmp_path, f"number,picture_of,kind\n{rows}"))
    table = write_table(
        tmp_path,
        "picture_of,kind\n" + rows.replace("0,im", "im", 1).replace("1,im", "im").replace("2,im", "im").replace("3,im", "im"),
    )
    dataset = index_dataset(table)
    assert labels_of(dataset) == ["a", "b", "a", "b"]
    assert f"{table}: the column 'picture_of' names images; --set data.file_column=NAME names another" in dataset.understood
    assert f"{table}: the column 'kind' was taken for the label; --set data.label_column=NAME names another" in dataset.understood


def test_columns_are_those_that_were_named(tmp_path: Path) -> None:
    text = "file,label,image,class,part,who,share\n"
    text += "".join(
        f"x,1,images/{n}.png,{label},{part},{n % 3},{n / 2}\n"
        for n, (label, part) in enumerate(zip("ababab", "111122", strict=True))
    )
    table = write_table(tmp_path, text)
    columns = Columns(file="image", label="Class", split="part", group="who", weight="share")
    dataset = index_dataset(table, reading=Reading(columns=columns, splits={"1": "train", "2": "val"}))
    assert dataset.sizes() == {"train": 4, "val": 2}
    assert [(sample.group, sample.weight) for sample in dataset.samples] == [(str(n % 3), n / 2) for n in range(6)]
    with pytest.raises(DataError) as caught:
        index_dataset(table, reading=Reading(columns=Columns(file="imag")))
    assert "data.file_column 'imag' is no column of it. Did you mean 'image'?" in str(caught.value)


def test_a_group_column_is_taken_and_one_that_may_be_is_said(tmp_path: Path) -> None:
    text = rows_of("a,1", "b,1", "a,2", "b,2", header="file_name,label,group")
    assert [sample.group for sample in index_dataset(write_table(tmp_path, text)).samples] == ["1", "1", "2", "2"]
    told = index_dataset(write_table(tmp_path, text.replace("group", "patient_id"))).understood
    assert any("data.group_column=patient_id keeps them on one side" in sentence for sentence in told)


def test_a_weight_column_that_nobody_named_is_said_and_not_used(tmp_path: Path) -> None:
    text = rows_of("a,1", "b,2", "a,3", "b,4", header="file_name,label,Weight")
    dataset = index_dataset(write_table(tmp_path, text))
    assert {sample.weight for sample in dataset.samples} == {1.0}
    assert any(
        "the column 'Weight' is not used; with --set data.weight_column=Weight" in sentence for sentence in dataset.understood
    )


def test_splits_of_another_name_ask_and_are_told(tmp_path: Path) -> None:
    text = rows_of("a,A", "b,A", "a,A", "b,A", "a,B", "b,B", header="file_name,label,split")
    table = write_table(tmp_path, text)
    assert "holds 'A', 'B', which are not train, val or test; say what they mean with data.splits" in str(problems_of(table))
    assert index_dataset(table, reading=Reading(splits={"A": "train", "B": "test"})).sizes() == {"train": 4, "test": 2}
    assert index_dataset(table, reading=Reading(splits={"A": "train", "B": "none"})).sizes() == {"train": 4}
    subset = index_dataset(
        write_table(tmp_path, text.replace("split", "subset").replace(",A", ",dev_set").replace(",B", ",training"))
    )
    assert subset.sizes() == {"train": 2, "val": 4}


def test_splits_in_another_language_are_read_and_said(tmp_path: Path) -> None:
    rows = [
        f"images/{n}.png,{label},{split}"
        for n, (label, split) in enumerate(zip("aabbab", ["Trainieren"] * 4 + ["Validierung"] * 2, strict=True))
    ]
    dataset = index_dataset(write_table(tmp_path, "\n".join(["file,label,split", *rows]) + "\n"))
    assert dataset.sizes() == {"train": 4, "val": 2}
    assert any(
        "'Trainieren' is train, 'Validierung' is val; data.splits says otherwise" in sentence for sentence in dataset.understood
    )


@pytest.mark.parametrize("weight", ["-1", "much", "", "inf", "nan"])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, weight: str) -> None:
    table = write_table(tmp_path, rows_of("a,1", f"b,{weight}", "a,1", "b,1", header="file_name,label,w"))
    with pytest.raises(DataError, match=r"weights must be numbers from 0 up: labels\.csv, row 3"):
        index_dataset(table, reading=Reading(columns=Columns(label="label", weight="w")))


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    assert list(problems_of(write_table(tmp_path, "file_name,label\n")).values()) == ["has a header and no rows"]
    with pytest.raises(DataError, match=r"labels\.csv: the table is empty"):
        index_dataset(write_table(tmp_path, ""))


def test_what_rows_lack_is_counted_and_named(tmp_path: Path) -> None:
    lacking = ["images/gone.png,a,train", "images/1.png,,train", ",b,train"]
    whole = [f"images/{n}.png,{label},train" for n, label in enumerate("ababab")]
    table = write_table(tmp_path, "\n".join(["file_name,label,split", *lacking, *whole]))
    dataset = index_dataset(table)
    assert dataset.sizes() == {"train": 6}
    assert {bad.where: bad.reason for bad in dataset.bad} == {
        "labels.csv, row 2: images/gone.png": "no such file",
        "labels.csv, row 4": "names no image file",
    }
    assert dataset.warnings == (f"{table}: 1 row without a label left out",)


def test_rows_that_contradict_each_other_are_all_named(tmp_path: Path) -> None:
    whole = [f"images/{n}.png,{label},train" for n, label in enumerate("abab")]
    table = write_table(tmp_path, "\n".join(["file_name,label,split", *whole, "images/0.png,b,train", "images/0.png,a,test"]))
    assert problems_of(table) == {
        "labels.csv, row 6": "images/0.png has the label 'b' here and 'a' in row 2",
        "labels.csv, row 7": "images/0.png has the split 'test' here and 'train' in row 2",
    }


def test_a_row_with_more_cells_than_columns_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows_of("a", "b", "a, or b"))
    with pytest.raises(DataError, match="row 4: has 3 cells, but the table has 2 columns; put quotes"):
        index_dataset(table)


def test_a_row_that_says_the_same_again_counts_once(tmp_path: Path) -> None:
    text = rows_of("a", "b", "a", "b") + "./images/0.png,a\nimages/1.png,b\n"
    dataset = index_dataset(write_table(tmp_path, text))
    assert len(dataset.samples) == 4
    assert dataset.warnings == (f"{tmp_path}/labels.csv: 2 rows that repeat another one, left out",)


def test_labels_that_no_terminal_can_show_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows_of("a", "b", "a\x07", "a\u202eb", "a\x07", "a\u202eb"))
    with pytest.raises(DataError) as caught:
        index_dataset(table)
    told = str(caught.value)
    assert "a class name that has control or direction characters: 'a\\x07'" in told
    assert "a class name that has control or direction characters: 'a\\u202eb'" in told
    assert not set(told) & set("\x07\u202e")


def test_a_table_in_another_encoding_is_read_and_said(tmp_path: Path) -> None:
    text = rows_of("thé", "café", "thé", "café")
    for encoding in ("cp1252", "utf-16", "utf-8-sig"):
        dataset = index_dataset(write_table(tmp_path, text.encode(encoding)))
        assert dataset.classes == ("café", "thé")
        assert any("not UTF-8 text; it was read as cp1252" in told for told in dataset.understood) == (encoding == "cp1252")


def test_a_table_of_a_spreadsheet_may_be_separated_by_semicolons_and_may_have_no_header(tmp_path: Path) -> None:
    text = rows_of("a", "b", "a", "b")
    assert labels_of(index_dataset(write_table(tmp_path, text.replace(",", ";")))) == ["a", "b", "a", "b"]
    dataset = index_dataset(write_table(tmp_path, text.partition("\n")[2]))
    assert labels_of(dataset) == ["a", "b", "a", "b"]
    assert any("has no line with the names of its columns" in told for told in dataset.understood)


def test_files_are_found_where_paths_were_written_on_another_machine(tmp_path: Path) -> None:
    rows = ["C:\\photos\\images\\0.png,a", "/home/ann/images/1.png,b", "2.png,a", "3,b"]
    dataset = index_dataset(write_table(tmp_path, "image_id,label\n" + "\n".join(rows)))
    assert [sample.id for sample in dataset.samples] == [f"images/{number}.png" for number in range(4)]
    told = " ".join(dataset.understood)
    assert "2 files found by name alone" in told or "1 file found by name alone" in told
    assert "found by name without its ending" in told


def test_a_name_that_several_files_have_is_not_guessed(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows_of("a", "b", "a", "b") + "far/away/0.png,a\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.png").write_bytes(encoded("x"))
    dataset = index_dataset(table)
    assert [bad.reason for bad in dataset.bad] == ["no such file"]


def test_what_the_reader_of_tables_cannot_read_is_told_with_its_line(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows_of("a", "b") + f'images/2.png,"{"x" * (1 << 25)}"\n')
    with pytest.raises(DataError, match="row 4: cannot be read as a table: field larger than field limit"):
        index_dataset(table)


def test_a_table_of_nothing_but_test_images_is_not_trained_on(tmp_path: Path) -> None:
    text = rows_of("a,test", "b,test", header="file_name,label,split")
    table = write_table(tmp_path, text)
    assert list(problems_of(table).values()) == ["nothing to train on: all of it is for validation or testing"]
    assert index_dataset(table, for_training=False).sizes() == {"test": 2}


# ── tables as other programs write them ───────────────────────────────────────────────────────────

PLAIN = rows_of("a", "b", "a", "b", "a", "b")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        pytest.param(PLAIN.encode("utf-16-le"), "read as utf-16-le", id="UTF-16 without a mark"),
        pytest.param(PLAIN.encode("utf-16-be"), "read as utf-16-be", id="UTF-16 big-endian without a mark"),
        pytest.param("sep=;\n" + PLAIN.replace(",", ";"), "separated by semicolons", id="Excel's line with the separator"),
        pytest.param("# exported\n# by a tool\n" + PLAIN, "a comment before the names", id="comments"),
        pytest.param(PLAIN.replace(",", " , "), "spaces around the cells", id="spaces"),
        pytest.param(
            "\n".join([PLAIN.splitlines()[0], *("'" + line.replace(",", "','") + "'" for line in PLAIN.splitlines()[1:])]),
            "single quotes around the cells",
            id="single quotes",
        ),
        pytest.param(PLAIN.replace("file_name", "id").replace(".png", ""), "names images without endings", id="ids"),
    ],
)
def test_a_table_of_another_program_is_read_and_how_is_said(tmp_path: Path, table: str | bytes, said: str) -> None:
    dataset = index_dataset(write_table(tmp_path, table))
    assert labels_of(dataset) == ["a", "b"] * 3
    assert any(said in sentence for sentence in dataset.understood), dataset.understood


def test_a_column_that_flags_validation_images_is_the_split(tmp_path: Path) -> None:
    lines = PLAIN.splitlines()
    table = [f"{lines[0]},is_valid", *(f"{line},{number > 3}" for number, line in enumerate(lines[1:]))]
    dataset = index_dataset(write_table(tmp_path, "\n".join(table)))
    assert [sample.split for sample in dataset.samples] == ["train"] * 4 + ["val"] * 2
    assert any("true is val, false is train" in sentence for sentence in dataset.understood)


def test_a_column_for_each_label_is_recognised_and_refused_with_a_way_out(tmp_path: Path) -> None:
    table = "file_name,cat,dog\n" + "\n".join(f"{number}.png,{number % 2},1" for number in range(6))
    (problem,) = problems_of(write_table(tmp_path, table)).values()
    assert "cat, dog hold 0 and 1, as if each were a label" in problem


def test_json_lines_in_utf_16_are_refused_in_one_sentence(tmp_path: Path) -> None:
    table = write_table(tmp_path, '{"file": "0.png", "label": "a"}'.encode("utf-16"), name="labels.jsonl")
    with pytest.raises(DataError, match="UTF-16 text, and JSON lines are UTF-8"):
        index_dataset(table)


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("photos.rar", b"Rar!\x1a\x07\x00", "a RAR archive"),
        ("photos.zip", b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        ("photos.tar.bz2", b"BZh91AY", "packed with bzip2"),
        ("labels.json", b"[1]", "JSON of an unknown form"),
        ("labels.xlsx", b"PK\x03\x04", "spreadsheets are not read"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as refused:
        index_dataset(tmp_path / name)
    assert what in f"{refused.value.message} {refused.value.problems}"


def test_archives_inside_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "cat.zip").write_bytes(b"PK\x03\x04")
    assert "archives inside are not opened, so unpack them first: cat.zip" in str(problems_of(tmp_path))


@pytest.mark.parametrize(
    "header",
    ["Bild,Kategorie,Aufteilung", "Dateiname,Klasse,Split", "Fichier,Étiquette,Répartition", "archivo,Categoría,conjunto"],
)
def test_columns_and_splits_in_other_languages_are_read_and_said(tmp_path: Path, header: str) -> None:
    values = ("Training", "Validierung", "Pruefung" if "Split" in header else "Prüfung")
    rows = "".join(f"images/{number}.png,{'ab'[number % 2]},{values[number // 2]}\n" for number in range(6))
    dataset = index_dataset(write_table(tmp_path, f"{header}\n{rows}"))
    assert dataset.sizes() == {"train": 2, "val": 2, "test": 2}
    file, label, split = header.split(",")
    assert any(f"images from {file!r}, labels from {label!r}, splits from {split!r}" in told for told in dataset.understood)


def test_an_english_name_of_a_column_comes_first(tmp_path: Path) -> None:
    rows = "".join(f"images/{number}.png,{'ab'[number % 2]},x,y\n" for number in range(4))
    assert index_dataset(write_table(tmp_path, f"file_name,label,Kategorie,Foto\n{rows}")).classes == ("a", "b")


def test_what_is_expected_is_not_said_of_a_table_that_is_there(tmp_path: Path) -> None:
    write_table(tmp_path, "file_name,one,two\n" + "".join(f"images/{number}.png,{number},b\n" for number in range(4)))
    with pytest.raises(DataError, match=r"no column for the label") as refused:
        index_dataset(tmp_path)
    assert "Expected" not in str(refused.value)
