"""URIs of remote files: ``s3://``, ``gs://``, ``hf://`` and all others that fsspec supports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from finetune.distribution import install_command
from finetune.errors import DataError, DiskFull, MissingExtra

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}


def is_uri(location: object) -> bool:
    """Return whether a location is a URI, such as ``s3://bucket/photos``."""
    return _URI.match(str(location)) is not None


@lru_cache(maxsize=32)
def open_address(location: str, process: int) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URI, and the path in it.

    Args:
        process: the process id, as part of the cache's key: a forked process must not use its parent's filesystem.

    Raises:
        MissingExtra: fsspec is not installed.
    """
    try:
        import fsspec
    except ModuleNotFoundError:
        raise MissingExtra(f"{location}: addresses need fsspec: {install_command('s3')}") from None
    filesystem, path = fsspec.core.url_to_fs(location)
    return filesystem, path


@contextmanager
def errors_named(location: str) -> Iterator[None]:
    """Convert all exceptions of the library behind a URI, which differ by library, to `DataError` or `MissingExtra`."""
    try:
        yield
    except (DataError, MissingExtra, DiskFull):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{location}: no such folder or file") from error
    except ImportError as error:
        kind = location.partition("://")[0]
        package = _PACKAGES.get(kind)
        how = install_command("s3") if package == "s3fs" else f"pip install {package}" if package else str(error)
        raise MissingExtra(f"{location}: addresses of the kind {kind}:// need another package: {how}") from None
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{location}: cannot be read: {cause}") from error
