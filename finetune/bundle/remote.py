"""Fetch bundles from object storage and write them there. Torch-free.

An address is any that fsspec supports (``s3://bucket/models/flowers/3``). A bundle at an address consists of its files and
``bundle.json``, which contains their checksums and is written last, so that no reader uses an incomplete bundle. It may have
``predictions.npz`` beside it, the model's predictions on its test images, with which a later version is compared before
promotion.
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
    """Fetch the bundle at an address, unless this version of it has been fetched before; return its local folder.

    Args:
        folder: for fetched bundles, each under the checksum of its manifest.

    Raises:
        BundleError: there is no bundle, or a file does not have the checksum in the manifest.
        MissingExtra: no package for this kind of address is installed.
        DiskFull: there is no space for the bundle.
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
    """Copy a bundle to an address, the manifest last, so that no reader fetches an incomplete bundle.

    Args:
        predictions: table of the model's predictions on its test images, which is copied too.

    Raises:
        BundleError: the folder is not a bundle, or one of its files was changed.
        DataError: the address cannot be written to, or another bundle is there.
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
            raise DataError(f"{address}: there is another bundle already. Give each version an address of its own")
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
