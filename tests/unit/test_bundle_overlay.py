"""The overlay shows where the evidence is, in a colour map that every eye and every printer can order."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.bundle.overlay import colour_map, overlay_png, write_overlay

GREY = np.full((96, 128, 3), 128, np.uint8)


def drawn(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of the decoded overlay."""
    with Image.open(io.BytesIO(overlay_png(image, cam))) as png:
        assert png.format == "PNG"
        return np.asarray(png.convert("RGB"))


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of (..., 3) uint8 sRGB."""
    levels = rgb / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_the_colour_map_rises_evenly_in_lightness() -> None:
    steps = np.diff(lightness(colour_map()[::8]))
    assert colour_map().shape == (256, 3)
    assert (steps > 0).all()
    assert steps.max() < 2.5 * steps.min()


def test_the_brightest_spot_is_where_the_evidence_is() -> None:
    cam = np.zeros((6, 8), np.float32)
    cam[1, 6] = 3.0
    rgb = drawn(GREY, cam)
    assert rgb.shape == (96, 128, 3)
    row, column = np.unravel_index(lightness(rgb).argmax(), (96, 128))
    assert (row // 16, column // 16) == (1, 6)


def test_evidence_against_the_class_shows_as_none() -> None:
    cam = np.zeros((6, 8), np.float32)
    cam[1, 6] = 3.0
    against = cam.copy()
    against[4, 1] = -50.0
    np.testing.assert_array_equal(drawn(GREY, against), drawn(GREY, cam))


@pytest.mark.parametrize("cam", [np.zeros((7, 7), np.float32), np.full((7, 7), -2.0, np.float32)])
def test_a_map_without_evidence_is_drawn_plain(cam: np.ndarray) -> None:
    assert len(np.unique(drawn(GREY, cam).reshape(-1, 3), axis=0)) == 1


def test_a_scaled_map_looks_the_same() -> None:
    cam = np.random.default_rng(0).random((7, 7), np.float32)
    np.testing.assert_array_equal(drawn(GREY, cam), drawn(GREY, cam * np.float32(64)))


def test_the_subjects_own_colour_is_not_mistaken_for_evidence() -> None:
    orange = np.full((32, 32, 3), (255, 160, 40), np.uint8)
    grey = np.repeat(np.asarray(Image.fromarray(orange).convert("L"))[..., None], 3, axis=2)
    cam = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(drawn(orange, cam), drawn(grey, cam))


def test_a_photographs_overlay_is_small(photos: Path) -> None:
    paths = sorted((photos / "validation").rglob("*.jpg"))[:10]
    assert len(paths) == 10
    cam = np.random.default_rng(0).random((7, 7), np.float32)
    for path in paths:
        with Image.open(path) as photo:
            assert len(overlay_png(np.asarray(photo.convert("RGB").resize((224, 224))), cam)) < 60_000


@pytest.mark.parametrize("cam", [np.ones((1, 1), np.float32), np.ones((40, 3), np.float64)])
def test_any_shape_of_map_and_image_works(cam: np.ndarray) -> None:
    assert drawn(np.zeros((1, 1, 3), np.uint8), cam).shape == (1, 1, 3)


def test_writing_makes_the_folder_and_gives_the_path(tmp_path: Path) -> None:
    path = write_overlay(tmp_path / "maps" / "a.png", GREY, np.ones((2, 2), np.float32))
    assert path.read_bytes() == overlay_png(GREY, np.ones((2, 2), np.float32))
