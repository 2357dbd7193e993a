"""Whatever the shape of an image and of the input, framing stays inside the image and shows what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.bundle.preprocess import Preprocess
from finetune.errors import BundleError

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 5_000))
INPUTS = st.tuples(st.integers(1, 400), st.integers(1, 400))
FRACTIONS = st.floats(0.05, 1.0)
RESIZES = st.sampled_from(["crop", "squash", "letterbox"])


def preprocess(
    input_px: tuple[int, int], resize: str = "crop", crop: float = 0.875, interpolation: str = "bicubic"
) -> Preprocess:
    return Preprocess(input_px, resize, crop, interpolation, (1, 2, 3), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))  # type: ignore[arg-type]


@given(SIDES, SIDES, INPUTS, RESIZES, FRACTIONS)
def test_the_box_is_centred_and_inside_the_image(
    height: int, width: int, input_px: tuple[int, int], resize: str, crop: float
) -> None:
    left, top, right, bottom = preprocess(input_px, resize, crop).framing(height, width).box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left + right == pytest.approx(width)
    assert top + bottom == pytest.approx(height)


@given(SIDES, SIDES, INPUTS, RESIZES, FRACTIONS)
def test_crop_and_squash_fill_the_input_and_letterbox_fills_one_side(
    height: int, width: int, input_px: tuple[int, int], resize: str, crop: float
) -> None:
    framing = preprocess(input_px, resize, crop).framing(height, width)
    if resize == "letterbox":
        assert any(inner == side for inner, side in zip(framing.size_px, input_px, strict=True))
        assert all(1 <= inner <= side for inner, side in zip(framing.size_px, input_px, strict=True))
    else:
        assert framing.size_px == input_px
        assert framing.corner_px == (0, 0)


@given(SIDES, SIDES, INPUTS, FRACTIONS)
def test_crop_keeps_the_shape_of_things(height: int, width: int, input_px: tuple[int, int], crop: float) -> None:
    left, top, right, bottom = preprocess(input_px, "crop", crop).framing(height, width).box
    assert input_px[0] / (bottom - top) == pytest.approx(input_px[1] / (right - left))
    kept = max((bottom - top) / height, (right - left) / width)
    assert kept == pytest.approx(crop)


@given(SIDES, SIDES, INPUTS, FRACTIONS)
def test_squash_keeps_the_same_part_of_both_sides(height: int, width: int, input_px: tuple[int, int], crop: float) -> None:
    left, top, right, bottom = preprocess(input_px, "squash", crop).framing(height, width).box
    assert ((bottom - top) / height, (right - left) / width) == pytest.approx((crop, crop))


@given(SIDES, SIDES, INPUTS)
def test_an_uncropped_letterbox_shows_all_of_the_image(height: int, width: int, input_px: tuple[int, int]) -> None:
    assert preprocess(input_px, "letterbox", 1.0).framing(height, width).box == pytest.approx((0, 0, width, height))


@given(INPUTS, FRACTIONS, RESIZES, SIDES, SIDES)
def test_what_is_asked_of_the_decoder_leaves_the_resample_at_least_a_halving(
    input_px: tuple[int, int], crop: float, resize: str, short: int, longer: int
) -> None:
    asking = preprocess(input_px, resize, crop)
    height = asking.decode_short_side_px  # the smallest that the decoder may give
    framing = asking.framing(height, height + longer)
    left, top, right, bottom = framing.box
    rounding = 1 + 1 / min(framing.size_px)
    assert (bottom - top) / framing.size_px[0] * rounding >= 2 * (1 - 1e-9)
    assert (right - left) / framing.size_px[1] * rounding >= 2 * (1 - 1e-9)


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    INPUTS,
    RESIZES,
    FRACTIONS,
    st.sampled_from(["bilinear", "bicubic", "lanczos", "nearest"]),
    st.tuples(*[st.integers(0, 255)] * 3),
)
def test_an_image_of_one_colour_stays_that_colour(
    height: int,
    width: int,
    input_px: tuple[int, int],
    resize: str,
    crop: float,
    interpolation: str,
    colour: tuple[int, int, int],
) -> None:
    shown = preprocess(input_px, resize, crop, interpolation)
    out = shown(np.full((height, width, 3), colour, np.uint8))
    assert out.shape == (*input_px, 3)
    assert out.dtype == np.uint8
    framing = shown.framing(height, width)
    (top, left), (h, w) = framing.corner_px, framing.size_px
    inside = np.zeros(input_px, bool)
    inside[top : top + h, left : left + w] = True
    assert (out[inside] == colour).all()
    assert (out[~inside] == shown.fill).all()


@settings(max_examples=40)
@given(st.integers(1, 80), st.integers(1, 80), RESIZES, st.integers(0, 2**32 - 1))
def test_mirroring_the_image_mirrors_the_input(height: int, width: int, resize: str, seed: int) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    shown = preprocess((32, 32), resize)
    if shown.framing(height, width).size_px[1] % 2:  # an odd letterbox cannot stand in the middle of an even input
        return
    difference = shown(rgb)[:, ::-1].astype(int) - shown(np.ascontiguousarray(rgb[:, ::-1])).astype(int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("size_px", [(1, 1), (8, 8), (20, 4000), (4000, 20), (1, 65_500)])
@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
def test_extreme_shapes_work(size_px: tuple[int, int], resize: str) -> None:
    out = preprocess((224, 224), resize)(np.full((*size_px, 3), 200, np.uint8))
    assert out.shape == (224, 224, 3)
    assert (out == 200).all(axis=2).any()


@pytest.mark.parametrize(
    ("interpolation", "filter"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
def test_an_uncropped_square_equals_pillows_antialiased_resize(interpolation: str, filter: Image.Resampling) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    expected = np.asarray(Image.fromarray(rgb).resize((224, 224), filter))
    np.testing.assert_array_equal(preprocess((224, 224), "crop", 1.0, interpolation)(rgb), expected)


def test_one_resample_equals_resizing_then_cropping_where_both_are_exact() -> None:
    """The usual evaluation transform: shorter side to 256, centre 224; here 512 → 256 is exact, so no rounding differs."""
    rgb = np.random.default_rng(0).integers(0, 256, (512, 768, 3), np.uint8)
    resized = Image.fromarray(rgb).resize((384, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((80, 16, 304, 240)))
    difference = preprocess((224, 224))(rgb).astype(int) - expected
    assert np.abs(difference).max() <= 1


@given(INPUTS, RESIZES, FRACTIONS)
def test_a_preprocess_survives_json_and_keeps_its_digest(input_px: tuple[int, int], resize: str, crop: float) -> None:
    original = preprocess(input_px, resize, crop)
    again = Preprocess.from_dict(original.to_dict())
    assert again == original
    assert again.digest() == original.digest()
    assert Preprocess.from_dict({**original.to_dict(), "fill": [9, 9, 9]}).digest() != original.digest()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"crop_fraction": 0}, "crop_fraction"),
        ({"crop_fraction": 1.5}, "crop_fraction"),
        ({"crop_fraction": math.nan}, "crop_fraction"),
        ({"std": [0.2, 0.0, 0.2]}, "std.1"),
        ({"fill": [0, 0, 256]}, "fill.2"),
        ({"resize": "stretch"}, "resize"),
        ({"input_size_px": [0, 224]}, "input_size_px.0"),
        ({"input_size_px": [224]}, "input_size_px.1"),
        ({"gamma": 2.2}, "gamma"),
    ],
)
def test_a_preprocess_that_is_off_is_refused_with_its_field(changes: dict[str, object], where: str) -> None:
    given_fields = {**preprocess((224, 224)).to_dict(), **changes}
    with pytest.raises(BundleError) as caught:
        Preprocess.from_dict(given_fields)
    assert [problem.where for problem in caught.value.problems] == [where]
