"""Names of members of archives: decoded by evidence, the doubt said; and which of them are refused."""

from __future__ import annotations

import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from folders import encoded, write_classes

from finetune.data.contents import unpack_archive
from finetune.data.index import index_dataset
from finetune.data.names import NameRefused, checked_parts, class_name, decode_names
from finetune.data.reading import Reading
from finetune.errors import DataError
from finetune.messages import encodable, printable

WRITTEN = [
    (("café", "naïve", "Müller"), "cp437"),
    (("Água", "São"), "cp850"),
    (("猫", "犬"), "cp932"),
    (("ネコ", "写真", "いぬ", "表示"), "cp932"),
    (("猫", "狗"), "gbk"),
    (("新建文件夹", "向日葵"), "gbk"),
    (("貓", "狗", "向日葵"), "big5"),
    (("고양이", "개"), "cp949"),
    (("кот", "собака"), "cp866"),
    (("Кошки", "Собаки"), "cp866"),
    (("кот", "собака"), "cp1251"),
    (("café", "grün"), "cp1252"),
    (("γάτα", "σκύλος"), "cp1253"),
    (("köpek", "kuş", "ağaç"), "cp1254"),
    (("café", "thé"), "utf-8"),
    (("猫", "犬"), "utf-8"),
]


@pytest.mark.parametrize(("names", "encoding"), WRITTEN, ids=lambda value: value if isinstance(value, str) else value[0])
def test_names_in_the_encodings_that_archives_hold_come_out_right(names: tuple[str, ...], encoding: str) -> None:
    decoded = decode_names([name.encode(encoding) for name in names])
    assert decoded.texts == names
    assert decoded.remark is not None
    assert names[0] in decoded.remark or any(name in decoded.remark for name in names)


def test_the_doubt_is_said_where_another_reading_is_as_good_and_the_choice_is_a_persons() -> None:
    raw = ["猫".encode("gbk"), "狗".encode("gbk")]
    assert "it could also be '癡' as big5" in (decode_names(raw).remark or "")
    assert decode_names(raw, "big5").texts == ("癡", "僩")
    assert "'猫' as gbk" in (decode_names(raw[:1]).remark or ""), "two bytes alone are valid UTF-8, by accident"
    with pytest.raises(NameRefused, match="is not an encoding"):
        decode_names(raw, "klingon")
    with pytest.raises(NameRefused, match=r"not valid in data\.name_encoding utf-8"):
        decode_names(raw, "utf-8")


def test_plain_names_need_no_word() -> None:
    assert decode_names([b"cat", b"dog/1.jpg"]).remark is None
    assert decode_names([]).texts == ()


@pytest.mark.parametrize("encoding", ["cp437", "utf-8", "cp932"])
def test_a_zip_without_the_flag_is_read_the_same_in_place_and_unpacked(encoding: str, tmp_path: Path) -> None:
    labels = ("猫", "犬") if encoding == "cp932" else ("café", "thé")
    files = {f"{label}/{n}.png".encode(encoding): encoded(f"{label}{n}") for label in labels for n in (0, 1)}
    packed = raw_zip(tmp_path / "a.zip", files)
    unpack_archive(packed, tmp_path / "unpacked")
    for location in (packed, tmp_path / "unpacked"):
        dataset = index_dataset(location)
        assert dataset.classes == tuple(sorted(labels))
        assert any("names without a stated encoding" in sentence for sentence in dataset.understood)
    other = index_dataset(packed, reading=Reading(name_encoding="cp850" if encoding != "cp437" else "cp866"))
    assert other.classes != tuple(sorted(labels))


def test_the_unicode_name_beside_a_local_one_is_taken(tmp_path: Path) -> None:
    files = {f"{label}/{n}.png".encode("cp1251"): encoded(f"{label}{n}") for label in ("ко", "да") for n in (0, 1)}
    packed = raw_zip(tmp_path / "a.zip", files, {name: name.decode("cp1251") for name in files})
    dataset = index_dataset(packed)
    assert dataset.classes == ("да", "ко")
    assert not dataset.understood


def raw_zip(path: Path, files: dict[bytes, bytes], unicode_names: dict[bytes, str] | None = None) -> Path:
    """A zip of stored files whose names are these bytes, without the UTF-8 flag."""
    body, directory = b"", b""
    for name, data in files.items():
        extra = b""
        if unicode_names is not None:
            inside = b"\x01" + struct.pack("<L", zlib.crc32(name)) + unicode_names[name].encode()
            extra = struct.pack("<HH", 0x7075, len(inside)) + inside
        common = struct.pack("<HHHHHLLLHH", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), len(extra))
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHLL", 0, 0, 0, 0, len(body)) + name + extra
        body += b"PK\x03\x04" + common + name + extra + data
    end = struct.pack("<HHHHLLH", 0, 0, len(files), len(files), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\x05\x06" + end)
    return path


def test_backslashes_are_separators_under_the_same_rules(tmp_path: Path) -> None:
    files = {f"photos\\{label}\\{n}.png".encode(): encoded(f"{label}{n}") for label in ("cat", "dog") for n in (0, 1)}
    assert index_dataset(raw_zip(tmp_path / "a.zip", files)).classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"points out of the archive with '\.\.'"):
        index_dataset(raw_zip(tmp_path / "b.zip", {**files, b"cat\\..\\..\\x.png": b""}))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/passwd", "absolute"),
        ("\\windows\\x", "absolute"),
        ("c:/x", "absolute"),
        ("a/../../x", "points out"),
        ("a\\..\\x", "points out"),
        ("a\x00b", "control"),
        ("a\x9fb", "control"),
        ("a\u202eb", "direction"),
        ("a/" * 70 + "x", "64 folders deep"),
        ("x" * 256, "255 characters"),
    ],
)
def test_a_path_that_leads_anywhere_else_is_refused(path: str, why: str) -> None:
    with pytest.raises(NameRefused, match=why):
        checked_parts(path)


def test_dots_and_doubled_separators_are_nothing() -> None:
    assert checked_parts("./a//b/./c.png") == ("a", "b", "c.png")
    assert checked_parts("") == ()


def test_accents_that_a_mac_took_apart_are_put_together_and_other_letters_stay() -> None:
    assert class_name(unicodedata.normalize("NFD", "café crème")) == "café crème"
    assert class_name("क़") == "क़"  # composed, this letter is two by the rules of Unicode, and was typed as one
    assert class_name("Å") == "Å"
    assert class_name(" rose ") == " rose "


def test_class_folders_in_another_encoding_ask_and_are_read_when_told(tmp_path: Path) -> None:
    for name in ("thé", "café"):
        folder = tmp_path.joinpath("data", name.encode("latin-1").decode("utf-8", "surrogateescape"))
        write_classes(tmp_path / "data", {folder.name: 2})
    with pytest.raises(DataError) as caught:
        index_dataset(tmp_path / "data")
    assert "set data.name_encoding: it reads 'café' as cp1252" in str(caught.value)
    assert index_dataset(tmp_path / "data", reading=Reading(name_encoding="latin-1")).classes == ("café", "thé")


def test_one_safe_text_for_terminals_pages_and_json() -> None:
    assert printable("tab\there\x1b[31m") == "tab\\there\\x1b[31m"
    assert printable("caf\udce9.png") == encodable("caf\udce9.png") == "caf\\xe9.png"
    assert printable("گربه‌ها 👩‍🚀 \u3000") == "گربه‌ها 👩‍🚀 \u3000"
    assert printable("a\u202eb\u2028") == "a\\u202eb\\u2028"
