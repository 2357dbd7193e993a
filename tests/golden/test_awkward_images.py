"""Every awkward image file decodes to the scene it shows, or is refused in words that a person understands."""

from __future__ import annotations

import numpy as np
import pytest
from awkward import AWKWARD, READABLE, REFUSED, quadrants_of

from finetune.bundle.image import decode_image, header_size, image_size
from finetune.bundle.preprocess import Preprocess


def test_the_list_covers_what_it_says() -> None:
    assert len(READABLE) >= 40
    assert len(REFUSED) >= 20


@pytest.mark.parametrize("name", READABLE)
def test_a_readable_file_decodes_upright_in_its_true_colours(name: str) -> None:
    data, expected = AWKWARD[name]
    rgb = decode_image(data)
    assert rgb.dtype == np.uint8
    assert rgb.flags.writeable
    assert rgb.shape == (*expected.size_px, 3)
    if expected.quadrants is not None:
        np.testing.assert_allclose(quadrants_of(rgb), expected.quadrants, atol=expected.tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_file_says_why(name: str) -> None:
    data, expected = AWKWARD[name]
    with pytest.raises(expected.error) as caught:
        decode_image(data)
    assert type(caught.value) is expected.error
    assert expected.says in caught.value.message


@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
@pytest.mark.parametrize("name", READABLE)
def test_loading_a_file_equals_decoding_it_and_then_preprocessing_it(name: str, resize: str) -> None:
    data, _ = AWKWARD[name]
    preprocess = Preprocess((32, 32), resize, 0.875, "bicubic", (124, 116, 104), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    loaded = preprocess.load(data)
    assert loaded.shape == (32, 32, 3)
    np.testing.assert_array_equal(loaded, preprocess(decode_image(data, short_side_px=preprocess.decode_short_side_px)))


@pytest.mark.parametrize("name", READABLE)
def test_the_size_of_a_file_is_its_upright_size(name: str) -> None:
    data, expected = AWKWARD[name]
    assert image_size(data) == expected.size_px[::-1]
    assert header_size(data) == expected.size_px[::-1], "the header alone tells it too"


@pytest.mark.parametrize("name", REFUSED)
def test_no_size_is_given_for_what_decoding_refuses(name: str) -> None:
    data, expected = AWKWARD[name]
    with pytest.raises(expected.error):
        image_size(data)
