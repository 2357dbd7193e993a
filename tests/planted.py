"""Plants faults in a copy of labelled pictures, and says where: what an examination must find."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

Change = Callable[[Image.Image, random.Random], Image.Image]


def _cropped(picture: Image.Image, rng: random.Random) -> Image.Image:
    width, height = picture.size
    left, top = int(width * rng.uniform(0, 0.2)), int(height * rng.uniform(0, 0.2))
    return picture.crop((left, top, left + int(width * 0.8), top + int(height * 0.8)))


def _framed(picture: Image.Image, rng: random.Random) -> Image.Image:
    width, height = picture.size
    return ImageOps.expand(picture, (int(width * 0.05), int(height * 0.05)), fill=(255, 255, 255))


CHANGES: Mapping[str, Change] = {
    "re-encoded": lambda picture, rng: picture,
    "resized": lambda picture, rng: picture.resize((int(picture.width * 0.6), int(picture.height * 0.6))),
    "cropped": _cropped,
    "mirrored": lambda picture, rng: ImageOps.mirror(picture),
    "brighter": lambda picture, rng: ImageEnhance.Contrast(ImageEnhance.Brightness(picture).enhance(1.25)).enhance(0.9),
    "framed": _framed,
}


def saved(picture: Image.Image, quality: int = 70) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def copied(source: Path, target: Path) -> list[Path]:
    """Copy class folders; return the copies in a fixed order."""
    for path in sorted(source.rglob("*.*")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return sorted(path for path in target.rglob("*.*"))


def plant_copies(root: Path, share: float, seed: int = 0) -> dict[str, str]:
    """Put changed copies beside a share of the pictures; return original by copy, both as ids."""
    rng = random.Random(seed)
    pictures = sorted(path for path in root.rglob("*.*"))
    planted = {}
    for number, path in enumerate(rng.sample(pictures, round(share * len(pictures)))):
        change = list(CHANGES.values())[number % len(CHANGES)]
        place = path.with_name(f"copy{number:04d}.jpg")
        with Image.open(path) as picture:
            place.write_bytes(saved(change(picture.convert("RGB"), rng)))
        planted[str(place.relative_to(root))] = str(path.relative_to(root))
    return planted


def plant_wrong_labels(root: Path, share: float, seed: int = 0) -> dict[str, str]:
    """Move a share of the pictures into another class; return the right label by id."""
    rng = random.Random(seed)
    pictures = sorted(path for path in root.rglob("*.*"))
    classes = sorted({path.parent.name for path in pictures})
    planted = {}
    for path in rng.sample(pictures, round(share * len(pictures))):
        label = rng.choice([name for name in classes if name != path.parent.name])
        place = root / label / f"moved-{path.parent.name}-{path.name}"
        path.rename(place)
        planted[str(place.relative_to(root))] = path.parent.name
    return planted
