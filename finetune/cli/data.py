"""`data`: show data with its revision, and the changes between two revisions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.training import json_option, reading_option

if TYPE_CHECKING:
    from finetune.data.manifest import Difference, Manifest

_SHOWN = 8


@click.group()
def data() -> None:
    """Show the contents of data, and compare two versions.

    \b
    finetune data show photos
    finetune data diff photos photos-2.zip
    """


@data.command()
@click.argument("data", metavar="DATA")
@reading_option
@json_option
def show(data: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the classes, counts and revision of DATA, and how it was read.

    DATA is a folder, archive, table or URL of labelled images, or the revision of data that was read before. Data that
    `finetune train` would refuse is refused. The revision changes with any image or label; a job with data.revision
    refuses data with another revision.
    """
    from finetune.cli.terminal import print_json

    manifest, notes = _manifest(data, settings, shown=not as_json, for_training=True)
    if as_json:
        counts = _counts(manifest)
        print_json(
            {
                "revision": manifest.digest,
                "name": manifest.name,
                "root": manifest.root,
                "classes": list(manifest.classes),
                "counts": counts,
                "n_images": len(manifest.rows),
                **notes,
            }
        )
    else:
        _show(manifest, notes)


@data.command()
@click.argument("before")
@click.argument("after")
@reading_option
@json_option
def diff(before: str, after: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Show what changed from BEFORE to AFTER, image by image.

    BEFORE and AFTER are folders, archives, tables or URLs of labelled images, or revisions of data that was read before. Images
    are matched by content, so a renamed file is listed as renamed.
    """
    from dataclasses import asdict

    from finetune.cli.terminal import print_json
    from finetune.data.manifest import compare

    first, second = (_manifest(one, settings, shown=not as_json)[0] for one in (before, after))
    found = compare(first, second)
    if as_json:
        print_json({"before": first.digest, "after": second.digest, **asdict(found)})
    else:
        _show_difference(first, second, found)


def _manifest(
    location: str, settings: tuple[str, ...], *, shown: bool, for_training: bool = False
) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest of data at a location or of a known revision, and notes made while reading.

    Args:
        for_training: refuse what a job would refuse to train on.
    """
    from finetune.data.check import check_images
    from finetune.data.index import index_dataset
    from finetune.data.manifest import find_manifest, keep, manifest_of
    from finetune.data.reading import reading_of
    from finetune.progress_bars import progress_bars
    from finetune.spec import load_spec
    from finetune.storage.store import Store
    from finetune.storage.workspace import Workspace

    workspace = Workspace.from_environment()
    if re.fullmatch("[0-9a-f]{8,64}", location) and not Path(location).exists():
        return find_manifest(workspace.datasets, location), {}
    spec = load_spec(None, {"training_file": location}, settings)
    store = Store(workspace.cache)
    with progress_bars(shown=shown) as progress:
        indexed = index_dataset(location, for_training=for_training, reading=reading_of(spec.data, store))
        most_bad = spec.data.max_bad_fraction if for_training else 0.99
        dataset = check_images(indexed, max_bad_fraction=most_bad, progress=progress, memory=store.folder("notes"))
    keep(workspace.datasets, dataset)
    bad = [{"file": one.where, "reason": one.reason} for one in dataset.bad]
    return manifest_of(dataset), {
        "understood": list(dataset.understood),
        "warnings": list(dataset.warnings),
        "quarantined": bad,
    }


def _counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Count images by split and class; images without a split are counted as ``all``."""
    counts: dict[str, dict[str, int]] = {}
    for row in manifest.rows:
        of_split = counts.setdefault(row.split or "all", dict.fromkeys(manifest.classes, 0))
        for label in row.labels:
            of_split[label] += 1
    return {split: counts[split] for split in ("train", "val", "test", "all") if split in counts}


def _show(manifest: Manifest, notes: dict[str, Any]) -> None:
    from finetune.cli.show_plan import SHOWN_CLASSES, show_notes
    from finetune.cli.terminal import table
    from finetune.messages import plural, printable
    from finetune.progress_bars import console

    counts = _counts(manifest)
    rows = [[name, *(counts[split][name] for split in counts)] for name in manifest.classes[:SHOWN_CLASSES]]
    sizes = Counter(row.split or "all" for row in manifest.rows)
    totals = ["all images", *(sizes[split] for split in counts)]
    table(f"Data: {printable(manifest.root)}", ["class", *counts], [*rows, totals])
    if len(manifest.classes) > SHOWN_CLASSES:
        console.print(f"  … and {len(manifest.classes) - SHOWN_CLASSES} more classes")
    show_notes(notes.get("understood", ()), notes.get("warnings", ()), notes.get("quarantined", ()))
    console.print(f"{plural(len(manifest.rows), 'image')}, revision {manifest.digest}", markup=False, soft_wrap=True)


def _show_difference(before: Manifest, after: Manifest, found: Difference) -> None:
    from finetune.messages import natural_list, printable
    from finetune.progress_bars import console

    names = f"{before.digest[:12]} → {after.digest[:12]}"
    console.print(f"{names}: {found.sentence()}", markup=False)
    lines: dict[str, list[str]] = {
        "new class": list(found.new_classes),
        "class gone": list(found.lost_classes),
        "added": list(found.added),
        "removed": list(found.removed),
        "other bytes": list(found.replaced),
        "relabelled": [f"{one}: {natural_list(old)} → {natural_list(new)}" for one, old, new in found.relabelled],
        "moved": [f"{one}: {old or 'no split'} → {new or 'no split'}" for one, old, new in found.moved],
        "renamed": [f"{old} → {new}" for old, new in found.renamed],
        "other group or weight": list(found.regrouped),
    }
    for kind, texts in lines.items():
        for text in texts[:_SHOWN]:
            console.print(f"  {kind:<12}  {printable(text)}", markup=False, soft_wrap=True)
        if len(texts) > _SHOWN:
            console.print(f"  {'':<12}  and {len(texts) - _SHOWN:,} more (--json lists them)")
