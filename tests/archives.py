"""Archives of class folders for tests: good ones, and one of every kind that must be refused."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping

from folders import encoded


def photographs(classes: Mapping[str, int] | None = None) -> dict[str, bytes]:
    """Member name → image file."""
    counts = {"daisy": 3, "rose": 3} if classes is None else classes
    return {f"{name}/{number}.png": encoded(f"{name}/{number}") for name, count in counts.items() for number in range(count)}


def zip_of(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # the constructor cuts a name at NUL
            info.compress_type = compression
            archive.writestr(info, data)
    return stream.getvalue()


def tar_of(members: Mapping[str, bytes], mode: str = "w", **header: object) -> bytes:
    """`header` overrides fields of the last member's header, as ``type=tarfile.SYMTYPE, linkname="/etc/passwd"``."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for number, (name, data) in enumerate(members.items(), 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == len(members):
                for key, value in header.items():
                    setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data[: info.size]))
    return stream.getvalue()


def good() -> dict[str, bytes]:
    files = photographs()
    return {
        "zip": zip_of(files),
        "zip, deflated": zip_of(files, zipfile.ZIP_DEFLATED),
        "tar": tar_of(files),
        "tar.gz": tar_of(files, "w:gz"),
        "tar, PAX": _tar_in(tarfile.PAX_FORMAT, files),
        "tar, dot names": tar_of({f"./{name}": data for name, data in files.items()}),
        "zip, junk": zip_of({**files, "__MACOSX/daisy/._0.png": b"x", "daisy/.DS_Store": b"x", "rose/Thumbs.db": b"x"}),
    }


def _tar_in(form: int, members: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), {"comment": "é"}
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _symlink_in_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("daisy/link.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return stream.getvalue()


def _patched_zip(data: bytes, local: int, central: int, value: int, form: str = "<H") -> bytes:
    """A zip of one member with one field of both of its headers changed."""
    patched = bytearray(data)
    start = patched.rindex(b"PK\x01\x02")
    struct.pack_into(form, patched, local, value)
    struct.pack_into(form, patched, start + central, value)
    return bytes(patched)


def _nameless_zip() -> bytes:
    """A directory entry with an empty name, on which the library's own reader raises IndexError."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x", b"1")
    data = stream.getvalue()
    start = data.index(b"PK\x01\x02")
    local = data[:26] + bytes(2) + data[28:30] + data[31:start]
    entry = data[start : start + 28] + bytes(2) + data[start + 30 : start + 46]
    end = data[data.index(b"PK\x05\x06") :]
    return local + entry + end[:12] + struct.pack("<II", len(entry), len(local)) + end[20:]


def _overlapping_zip() -> bytes:
    """Two entries of the directory that share one member's bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("daisy/0.png", b"0" * 500)
        archive.writestr("daisy/1.png", b"1" * 500)
        archive.filelist[1].header_offset = archive.filelist[0].header_offset
    return stream.getvalue()


def _tar_with_size(size_field: bytes) -> bytes:
    """A tar whose only member has this raw size field, with a right checksum."""
    archive = bytearray(tar_of({"daisy/0.png": b"x" * 600}))
    archive[124:136] = size_field
    archive[148:156] = b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    return bytes(archive)


def _pathmax_symlinks() -> bytes:
    """Nested links whose resolved length passes PATH_MAX, which made realpath give up and the library's filter pass."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        path, component = "", "d" * 50
        for letter in "abcdefghijklmnop":
            folder = tarfile.TarInfo(f"{path}{component}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            link = tarfile.TarInfo(f"{path}{letter}")
            link.type, link.linkname = tarfile.SYMTYPE, component
            archive.addfile(link)
            path += f"{component}/"
        escape = tarfile.TarInfo("escape")
        escape.type, escape.linkname = tarfile.SYMTYPE, "a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/" + "../" * 40 + "tmp"
        archive.addfile(escape)
    return stream.getvalue()


def bad() -> dict[str, tuple[bytes, str]]:
    """What is wrong → (archive, what the refusal says)."""
    image = encoded("one")
    files = photographs()
    names = {
        "parent": ("../escaped.png", "'../escaped.png' points out"),
        "parent inside": ("daisy/../../escaped.png", "escaped.png' points out"),
        "absolute": ("/escaped.png", "'/escaped.png' has an absolute path"),
        "backslash": ("daisy\\..\\..\\escaped.png", "points out of the archive"),
        "drive": ("C:/escaped.png", "'C:/escaped.png' has an absolute path"),
        "control character": ("daisy/a\nb.png", r"'daisy/a\\nb.png' has a control"),
        "direction override": ("daisy/a\u202egnp.png", "has a control or direction"),
        "too deep": (f"{'a/' * 80}e.png", "folders deep"),
        "long name": (f"daisy/{'x' * 300}.png", "has a name of more than 255 characters"),
    }
    cases = {}
    for what, (name, said) in names.items():
        cases[f"zip: {what}"] = (zip_of({**files, name: image}), said)
        cases[f"tar: {what}"] = (tar_of({**files, name: image}), said)
    for what, kind in {
        "symlink": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "character device": tarfile.CHRTYPE,
        "block device": tarfile.BLKTYPE,
        "fifo": tarfile.FIFOTYPE,
    }.items():
        last = {**files, "daisy/special.png": b""}
        cases[f"tar: {what}"] = (
            tar_of(last, type=kind, linkname="/etc/passwd"),
            "'daisy/special.png' is a link or a special file",
        )
    sparse = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "10", "GNU.sparse.numblocks": "1"}
    cases |= {
        "tar: sparse": (tar_of({"daisy/sparse.png": b"x" * 10}, pax_headers=sparse), "'daisy/sparse.png' is a link"),
        "zip: symlink": (_symlink_in_zip(), "'daisy/link.png' is a link"),
        "zip: twice": (zip_of({"daisy/a.png": image, "daisy//a.png": image}), "'daisy//a.png' occurs twice"),
        "tar: twice": (tar_of({"daisy/a.png": image, "./daisy/a.png": image}), "'./daisy/a.png' occurs twice"),
        "zip: file and folder": (zip_of({"daisy": image, "daisy/1.png": image}), "both a file and a folder"),
        "zip: folder and file": (zip_of({"daisy/1.png": image, "daisy": image}), "both a file and a folder"),
        "zip: bomb": (zip_of({"daisy/0.png": bytes(32 << 20)}, zipfile.ZIP_DEFLATED), "200 times its size"),
        "tar.gz: bomb": (gzip.compress(tar_of({"daisy/0.png": bytes(32 << 20)})), "200 times its size"),
        "zip: member without a name": (_nameless_zip(), "malformed|damaged|holds no files"),
        "zip: overlap": (_overlapping_zip(), "shares its bytes"),
        "zip: encrypted": (_patched_zip(zip_of({"daisy/0.png": image}), 6, 8, 0x1), "'daisy/0.png' is encrypted"),
        "zip: unknown method": (_patched_zip(zip_of({"daisy/0.png": image}), 8, 10, 99), "'daisy/0.png' is compressed with"),
        "zip: lying size": (_patched_zip(zip_of({"daisy/0.png": image}), 22, 24, 10, "<I"), "damaged|malformed"),
        "zip: bad checksum": (_patched_zip(zip_of({"daisy/0.png": image}), 14, 16, 1, "<I"), "damaged"),
        "zip: truncated": (zip_of(files)[:-40], "damaged"),
        "tar: truncated": (tar_of(files)[:1200], "damaged"),
        "tar.gz: truncated": (tar_of(files, "w:gz")[:-60], "damaged"),
        "tar: negative size": (_tar_with_size(b"\xff" * 12), "negative size"),
        "tar: huge size": (_tar_with_size(b"77777777777\0"), "is larger than 64 MiB"),
        "tar: links beyond PATH_MAX": (_pathmax_symlinks(), "is a link|folders deep"),
        "empty zip": (zip_of({}), "holds no files"),
        "empty tar": (tar_of({}), "holds no files|not a zip"),
        "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(600), "not a zip, tar or tar.gz"),
        "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(600), "not a zip, tar or tar.gz"),
        "html": (b"<!DOCTYPE html><html></html>" * 30, "not a zip, tar or tar.gz"),
    }  # fmt: skip
    return cases
