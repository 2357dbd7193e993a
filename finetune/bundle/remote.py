"""Bundles in object storage: fetched once and checked, and written so that no reader takes half of one for whole.

An address is whatever fsspec knows (``s3://bucket/models/flowers/3``). A bundle at an address is its files and ``bundle.json``,
which holds their checksums and is written last. Beside them may lie ``predictions.npz``, the model's answers to its test images,
with which a later version is compared before it is promoted. Torch-free.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from finetune.bundle.manifest import MANIFEST, Manifest, read_manifest
from finetune.errors import BundleError, DataError
from finetune.storage.addresses import errors_named, open_address
from finetune.storage.files import atomic_folder, sha256_file

PREDICTIONS = "predictions.npz"
MAX_MANIFEST_BYTES = 64 << 20


def fetch_bundle(address: str, folder: Path) -> Path:
    """Return the bundle at an address as a folder on this machine; one that was fetched before is not fetched again.

    Args:
        folder: where fetched bundles are kept, each under the checksum of its manifest.

    Raises:
        BundleError: no bundle is there, or a file is not what its manifest says.
        MissingExtra: no package for this kind of address is installed.
        DiskFull: no space for it.
    """
    address = address.rstrip("/")
    text = _manifest_at(address)
    manifest = Manifest.from_json(text)
    kept = folder / hashlib.sha256(text).hexdigest()[:32]
    if (kept / MANIFEST).is_file():
        return kept
    with atomic_folder(kept) as arriving:
        filesystem, path = open_address(address, os.getpid())
        for name, expected in manifest.files.items():
            try:
                with errors_named(f"{address}/{name}"):
                    filesystem.get_file(f"{path}/{name}", str(arriving / name))
            except DataError as error:
                raise BundleError(error.message) from None
            if sha256_file(arriving / name) != expected:
                raise BundleError(f"{address}: {name} is not what {MANIFEST} says: it was changed or cut short. Copy it again")
        with errors_named(f"{address}/{PREDICTIONS}"):
            if filesystem.exists(f"{path}/{PREDICTIONS}"):
                filesystem.get_file(f"{path}/{PREDICTIONS}", str(arriving / PREDICTIONS))
        (arriving / MANIFEST).write_bytes(text)
    return kept


def push_bundle(bundle: Path, address: str, predictions: Path | None = None) -> None:
    """Copy a bundle to an address; its manifest goes last, so that nobody fetches a part of it.

    Args:
        predictions: the table of the model's answers to its test images, which goes with it.

    Raises:
        BundleError: the folder is no bundle, a file of it was changed, or another bundle is at the address.
        DataError: the address cannot be written to.
        MissingExtra: no package for this kind of address is installed.
    """
    address = address.rstrip("/")
    manifest = read_manifest(bundle)
    for name, expected in manifest.files.items():
        if sha256_file(bundle / name) != expected:
            raise BundleError(f"{bundle}: {name} is not what {MANIFEST} says: it was changed. Export the bundle again")
    with errors_named(address):
        filesystem, path = open_address(address, os.getpid())
        if filesystem.exists(f"{path}/{MANIFEST}"):
            if filesystem.cat_file(f"{path}/{MANIFEST}") == (bundle / MANIFEST).read_bytes():
                return
            raise DataError(f"{address}: another bundle is there already. Give each version an address of its own")
        filesystem.makedirs(path, exist_ok=True)
        for name in manifest.files:
            filesystem.put_file(str(bundle / name), f"{path}/{name}")
        if predictions is not None:
            filesystem.put_file(str(predictions), f"{path}/{PREDICTIONS}")
        filesystem.put_file(str(bundle / MANIFEST), f"{path}/{MANIFEST}")


def _manifest_at(address: str) -> bytes:
    try:
        with errors_named(f"{address}/{MANIFEST}"):
            filesystem, path = open_address(address, os.getpid())
            text: bytes = filesystem.cat_file(f"{path}/{MANIFEST}", start=0, end=MAX_MANIFEST_BYTES)
            return text
    except DataError as error:
        hint = f". A bundle is a folder with {MANIFEST} in it" if isinstance(error.__cause__, FileNotFoundError) else ""
        raise BundleError(f"{error.message}{hint}") from None
