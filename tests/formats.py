"""One small dataset written in every format that is read, for tests: the same images under the same labels."""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from folders import encoded

Contents = Mapping[str | None, Mapping[str, int]]  # split -> class -> how many images


@dataclass(frozen=True)
class Image:
    split: str | None
    label: str
    number: int
    data: bytes

    @property
    def name(self) -> str:
        """A file name that no other image of the dataset has."""
        return "-".join(filter(None, (self.split, self.label, f"{self.number}.png")))


def images(contents: Contents) -> list[Image]:
    return [
        Image(split, label, number, encoded(f"{split}/{label}/{number}"))
        for split, by_class in contents.items()
        for label, count in by_class.items()
        for number in range(count)
    ]


def put(root: Path, name: str, data: bytes | str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def columns_of(contents: Contents) -> list[str]:
    return ["file_name", "label", *(["split"] if None not in contents else [])]


def rows_of(contents: Contents, folder: str = "") -> list[dict[str, str]]:
    return [
        {"file_name": f"{folder}{one.name}", "label": one.label, **({"split": one.split} if one.split else {})}
        for one in images(contents)
    ]


def put_images(root: Path, contents: Contents, folder: str = "") -> None:
    for one in images(contents):
        put(root, f"{folder}{one.name}", one.data)


def csv_text(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def class_folders(root: Path, contents: Contents) -> Path:
    for one in images(contents):
        put(root, "/".join(filter(None, (one.split, one.label, f"{one.number}.png"))), one.data)
    return root


def separated(root: Path, contents: Contents, ending: str = "csv") -> Path:
    put_images(root, contents)
    put(root, f"labels.{ending}", csv_text(rows_of(contents), "," if ending == "csv" else "\t"))
    return root / f"labels.{ending}"


def tab_separated(root: Path, contents: Contents) -> Path:
    return separated(root, contents, "tsv")


def json_lines(root: Path, contents: Contents) -> Path:
    put_images(root, contents, "pictures/")
    put(root, "labels.jsonl", "\n".join(json.dumps(row) for row in rows_of(contents, "pictures/")))
    return root / "labels.jsonl"


def json_lines_embedded(root: Path, contents: Contents) -> Path:
    lines = [
        json.dumps(
            {"image": base64.b64encode(one.data).decode(), "label": one.label, **({"split": one.split} if one.split else {})}
        )
        for one in images(contents)
    ]
    put(root, "labels.jsonl", "\n".join(lines))
    return root / "labels.jsonl"


def metadata_csv(root: Path, contents: Contents) -> Path:
    for split in contents:
        of_split = {split: contents[split]}
        rows = [{key: value for key, value in row.items() if key != "split"} for row in rows_of(of_split)]
        inside = root / split if split else root
        put_images(inside, of_split)
        put(inside, "metadata.csv", csv_text(rows))
    return root


def metadata_jsonl(root: Path, contents: Contents) -> Path:
    put_images(root, contents, "images/")
    put(root, "metadata.jsonl", "\n".join(json.dumps(row) for row in rows_of(contents, "images/")))
    return root


def metadata_parquet(root: Path, contents: Contents) -> Path:
    import pyarrow
    import pyarrow.parquet

    put_images(root, contents)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(contents)), root / "metadata.parquet")
    return root


def embedded_rows(contents: Contents) -> list[dict[str, Any]]:
    """Rows as the datasets library keeps them: an image is its bytes and its path."""
    return [
        {
            "image": {"bytes": one.data, "path": None},
            "label": one.label,
            **({"split": one.split} if one.split else {}),
        }
        for one in images(contents)
    ]


def parquet(root: Path, contents: Contents) -> Path:
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(embedded_rows(contents)), root / "flowers.parquet", row_group_size=5)
    return root / "flowers.parquet"


def parquet_of_plain_bytes(root: Path, contents: Contents) -> Path:
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "image": row["image"]["bytes"]} for row in embedded_rows(contents)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "flowers.parquet")
    return root / "flowers.parquet"


def saved_dataset(root: Path, contents: Contents) -> Path:
    """As ``save_to_disk`` writes it: class numbers, whose names are in the description."""
    if None in contents:
        _save_arrow(root, images(contents), sorted({one.label for one in images(contents)}))
        return root
    for split in contents:
        labels = sorted({one.label for one in images(contents)})
        _save_arrow(root / str(split), [one for one in images(contents) if one.split == split], labels)
    put(root, "dataset_dict.json", json.dumps({"splits": list(contents)}))
    return root


def _save_arrow(folder: Path, of_split: list[Image], labels: list[str]) -> None:
    import pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": one.data, "path": one.name}, "label": labels.index(one.label)} for one in of_split]
    table = pyarrow.Table.from_pylist(rows)
    half = len(rows) // 2
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    features = {"image": {"_type": "Image"}, "label": {"names": labels, "_type": "ClassLabel"}}
    put(folder, "dataset_info.json", json.dumps({"features": features}))
    put(folder, "state.json", json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))


def coco(root: Path, contents: Contents) -> Path:
    for split in contents:
        of_split = [one for one in images(contents) if one.split == split]
        labels = sorted({one.label for one in images(contents)})
        document = {
            "images": [{"id": number, "file_name": one.name, "width": 20, "height": 16} for number, one in enumerate(of_split)],
            "categories": [{"id": 10 + number, "name": label} for number, label in enumerate(labels)],
            "annotations": [
                {"id": number, "image_id": number, "category_id": 10 + labels.index(one.label)}
                for number, one in enumerate(of_split)
            ],
        }
        put(root, f"annotations/instances_{split or 'default'}.json", json.dumps(document))
    put_images(root, contents, "images/")
    return root


def label_studio(root: Path, contents: Contents) -> Path:
    tasks = []
    for number, one in enumerate(images(contents)):
        result = [{"type": "choices", "from_name": "kind", "to_name": "image", "value": {"choices": [one.label]}}]
        cancelled = {"result": [{**result[0], "value": {"choices": ["wrong"]}}], "was_cancelled": True}
        name = f"0123abcd-{one.name}"
        tasks.append({"id": number, "data": {"image": f"/data/upload/3/{name}"}, "annotations": [cancelled, {"result": result}]})
        put(root, f"images/{one.name}", one.data)
    put(root, "project-3-at-2026-11-26.json", json.dumps(tasks))
    return root


def label_studio_short(root: Path, contents: Contents) -> Path:
    tasks = [
        {"image": f"/data/upload/3/{one.name}", "id": n, "kind": one.label, "annotator": 1, "annotation_id": n, "lead_time": 1.5}
        for n, one in enumerate(images(contents))
    ]
    put_images(root, contents)
    put(root, "export.json", json.dumps(tasks))
    return root / "export.json"


def cvat(root: Path, contents: Contents) -> Path:
    elements = []
    for number, one in enumerate(images(contents)):
        subset = f' subset="{one.split.title()}"' if one.split else ""
        tag = f'<tag label={quoteattr(one.label)} source="manual"><attribute name="sure">yes</attribute></tag>'
        box = '<box label="thing" xtl="1" ytl="1" xbr="2" ybr="2"></box>' if number == 0 else ""
        elements.append(f'<image id="{number}" name={quoteattr(one.name)}{subset} width="20" height="16">{tag}{box}</image>')
    head = '<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task><name>x</name></task></meta>'
    put(root, "annotations.xml", f"{head}{''.join(elements)}</annotations>")
    put_images(root, contents, "images/")
    return root


def imagenet_lists(root: Path, contents: Contents) -> Path:
    labels = sorted({one.label for one in images(contents)})
    put(root, "synsets.txt", "\n".join(labels))
    for split in contents:
        lines = [f'"{one.name}" {labels.index(one.label)}' for one in images(contents) if one.split == split]
        put(root, f"{split or 'default'}.txt", "\n".join(lines))
    put_images(root, contents, "images/")
    return root


@dataclass(frozen=True)
class Format:
    """How a dataset is written, and which source reads it; some formats know no splits, some need a folder."""

    write: Callable[[Path, Contents], Path]
    source: str
    splits: bool = True


FORMATS: dict[str, Format] = {
    "class folders": Format(class_folders, "class folders"),
    "csv": Format(separated, "a table"),
    "tsv": Format(tab_separated, "a table"),
    "json lines": Format(json_lines, "a table"),
    "json lines, embedded": Format(json_lines_embedded, "a table"),
    "parquet": Format(parquet, "a table"),
    "parquet of plain bytes": Format(parquet_of_plain_bytes, "a table"),
    "metadata.csv": Format(metadata_csv, "images with a table"),
    "metadata.jsonl": Format(metadata_jsonl, "images with a table"),
    "metadata.parquet": Format(metadata_parquet, "images with a table"),
    "saved dataset": Format(saved_dataset, "a saved dataset"),
    "coco": Format(coco, "COCO annotations"),
    "label studio": Format(label_studio, "a Label Studio export", splits=False),
    "label studio, short": Format(label_studio_short, "a Label Studio export", splits=False),
    "cvat": Format(cvat, "a CVAT export"),
    "imagenet lists": Format(imagenet_lists, "ImageNet lists"),
}


def zipped(folder: Path) -> Path:
    """A zip of a folder, with the folder around everything."""
    target = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return target


def tarred(folder: Path, ending: str = "tar.gz") -> Path:
    target = folder.with_name(f"{folder.name}.{ending}")
    with tarfile.open(target, "w:gz" if ending == "tar.gz" else "w") as archive:
        archive.add(folder, arcname=f"./{folder.name}")
    return target
