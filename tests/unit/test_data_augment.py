"""Random views: pure functions of image and seed, of the model's size, each different."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from finetune.bundle.preprocess import Preprocess
from finetune.data.augment import build_augment, sample_seed
from finetune.data.transforms import Policy, offered_transforms
from finetune.errors import SpecError

Resize = Literal["crop", "squash", "letterbox"]


def preprocess_of(size_px: tuple[int, int] = (32, 32), resize: Resize = "crop") -> Preprocess:
    return Preprocess(size_px, resize, 0.875, "bicubic", (255, 255, 255), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8, smooth and without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def gradient(height: int, width: int) -> np.ndarray:
    """Red grows from left to right, green from top to bottom: a view tells where it was cut out."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[..., 0] = np.linspace(0, 255, width).round()[None, :]
    rgb[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return rgb


POLICIES: tuple[Policy, ...] = ("none", "light", "default", "strong")


def test_views_import_no_torch_and_the_librarys_part_for_it_can_still_be_imported() -> None:
    code = (
        "import sys\n"
        "import finetune.data.transforms\n"
        "assert 'albumentations' in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "from albumentations.pytorch import ToTensorV2\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
@pytest.mark.parametrize("shape", [(60, 80), (7, 300), (300, 7), (1, 1), (32, 32)])
def test_a_view_has_the_models_size_whatever_the_image(policy: Policy, resize: Resize, shape: tuple[int, int]) -> None:
    augment = build_augment(policy, None, preprocess_of((24, 32), resize))
    for seed in range(3):
        view = augment(picture(*shape), seed)
        assert view.shape == (24, 32, 3)
        assert view.dtype == np.uint8
        assert view.flags.c_contiguous


@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
def test_at_another_size_the_same_parts_of_an_image_are_seen(resize: Resize) -> None:
    augment = build_augment("default", None, preprocess_of((64, 64), resize))
    smaller = augment.at_size((32, 32))
    assert augment.at_size((64, 64)) is augment
    for seed in range(4):
        large, small = augment(picture(seed=seed), seed), smaller(picture(seed=seed), seed)
        assert small.shape == (32, 32, 3)
        halved = np.array(Image.fromarray(large).resize((32, 32), Image.Resampling.BOX), np.float64)
        assert np.abs(halved - small).mean() < 6


def test_explicit_transforms_are_framed_at_the_other_size() -> None:
    augment = build_augment("none", [{"HorizontalFlip": {"p": 1.0}}], preprocess_of((64, 64)))
    assert augment.at_size((48, 48))(picture(), 0).shape == (48, 48, 3)


@pytest.mark.parametrize("policy", ["light", "default", "strong"])
def test_a_view_is_a_function_of_image_and_seed(policy: Policy) -> None:
    augment, twin = (build_augment(policy, None, preprocess_of()) for _ in range(2))
    views = [augment(picture(), seed) for seed in range(20)]
    for seed in reversed(range(20)):  # in another order, by another object
        np.testing.assert_array_equal(twin(picture(), seed), views[seed])
    assert len({view.tobytes() for view in views}) == 20


def test_the_image_itself_is_left_as_it_was() -> None:
    rgb = picture()
    before = rgb.copy()
    for seed in range(5):
        build_augment("strong", None, preprocess_of())(rgb, seed)
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize("policy", ["default", "strong"])
def test_threads_that_share_an_augmentation_get_the_views_that_one_thread_gets(policy: Policy) -> None:
    augment = build_augment(policy, None, preprocess_of())
    rgb = picture()
    alone = [augment(rgb, seed).tobytes() for seed in range(200)]
    with ThreadPoolExecutor(8) as pool:
        together = [view.tobytes() for view in pool.map(lambda seed: augment(rgb, seed), range(200))]
    assert together == alone


def test_no_policy_is_the_preprocessing_of_evaluation() -> None:
    preprocess = preprocess_of()
    augment = build_augment("none", None, preprocess)
    np.testing.assert_array_equal(augment(picture(), 7), preprocess(picture()))


def test_no_two_positions_of_a_run_share_a_seed() -> None:
    seeds = {sample_seed(seed, epoch, index) for seed in range(3) for epoch in range(10) for index in range(300)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(0, 1, 2) == 8901564848246840783  # a resumed run of another release must draw the same views


def test_two_epochs_show_every_image_differently() -> None:
    augment = build_augment("default", None, preprocess_of())
    views = {
        (epoch, index): augment(picture(seed=index), sample_seed(0, epoch, index)).tobytes()
        for epoch in (0, 1)
        for index in range(50)
    }
    assert len(set(views.values())) == 100


def test_one_image_in_every_place_of_two_epochs_is_never_seen_twice_alike() -> None:
    # The library by itself repeats: its workers begin with copies of one generator, and every epoch begins with them again.
    augment = build_augment("default", None, preprocess_of())
    views = [augment(picture(), sample_seed(0, epoch, index)).tobytes() for epoch in (0, 1) for index in range(200)]
    assert len(set(views)) == 400


def test_transforms_of_one_view_draw_independently_of_each_other() -> None:
    # With one seed for every transform, as the library's own seeding gives them, whether a view is mirrored would decide where
    # it is cut out: both would begin with the same random number.
    augment = build_augment("default", None, preprocess_of())
    mirrored, left = [], []
    for index in range(600):
        view = augment(gradient(64, 64), sample_seed(0, 0, index)).astype(int)
        mirrored.append(view[:, 0, 0].mean() > view[:, -1, 0].mean())
        left.append(view[..., 0].min())
    flips, places = np.array(mirrored), np.array(left)
    assert 0.42 < flips.mean() < 0.58
    assert abs(np.corrcoef(flips, places)[0, 1]) < 0.15


def test_light_views_are_never_mirrored() -> None:
    augment = build_augment("light", None, preprocess_of())
    for seed in range(100):
        view = augment(gradient(64, 64), seed).astype(int)
        assert view[:, 0, 0].mean() < view[:, -1, 0].mean()


@pytest.mark.parametrize(("policy", "smallest"), [("light", 0.7), ("default", 0.35)])
def test_crops_keep_at_least_the_documented_share_of_the_image(policy: Policy, smallest: float) -> None:
    augment = build_augment(policy, None, preprocess_of())
    shares = []
    for seed in range(300):
        view = augment(gradient(256, 256), seed).astype(float)
        spread = [np.ptp(view[..., channel].mean(axis=axis)) for channel, axis in ((0, 0), (1, 1))]
        shares.append(spread[0] * spread[1] / 255**2)
    # Colour jitter stretches the gradient by up to a fifth, either way.
    assert np.median(shares) > smallest
    assert min(shares) > smallest * 0.5


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_wide_images_keep_both_ends_where_evaluation_shows_both_ends(resize: Resize) -> None:
    augment = build_augment("light", None, preprocess_of((64, 64), resize))
    cropped = build_augment("light", None, preprocess_of((64, 64), "crop"))
    wide = gradient(60, 360)
    assert np.median([np.ptp(augment(wide, seed)[..., 0].astype(int)) for seed in range(40)]) > 180
    assert np.median([np.ptp(cropped(wide, seed)[..., 0].astype(int)) for seed in range(40)]) < 120


def test_fine_stripes_are_averaged_when_shrunk_and_do_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel on, one off: any true average of four or more is near 127
    views = [build_augment("light", None, preprocess_of((64, 64)))(stripes, seed).astype(float) for seed in range(10)]
    assert max(view.std() for view in views) < 30  # bilinear resampling without antialiasing gives 60 to 120


def test_enough_pixels_are_decoded_for_the_smallest_crop() -> None:
    for policy, smallest in (("light", 0.7), ("default", 0.35), ("strong", 0.2)):
        preprocess = preprocess_of((224, 224))
        augment = build_augment(policy, None, preprocess)  # type: ignore[arg-type]
        assert augment.decode_short_side_px >= 224 / math.sqrt(smallest)
        assert augment.decode_short_side_px >= preprocess.decode_short_side_px


def test_the_digest_tells_augmentations_apart_and_knows_equals() -> None:
    digests = [build_augment(policy, None, preprocess_of()).digest() for policy in POLICIES]
    digests += [build_augment("default", None, preprocess_of(resize="squash")).digest()]
    digests += [build_augment("default", [{"HorizontalFlip": {"p": p}}], preprocess_of()).digest() for p in (0.5, 0.25)]
    assert len(set(digests)) == len(digests) == 7
    assert build_augment("default", None, preprocess_of()).digest() == digests[2]


# ------------------------------------------------------------------------------------------------- explicit transforms


def refused(transforms: Any) -> dict[str, str]:
    with pytest.raises(SpecError, match="the augmentation cannot be built") as caught:
        build_augment("default", transforms, preprocess_of())
    return {problem.where: problem.message for problem in caught.value.problems}


def test_explicit_transforms_take_the_place_of_the_policy_and_end_in_the_models_frame() -> None:
    augment = build_augment("strong", [{"VerticalFlip": {"p": 1.0}}], preprocess_of())
    np.testing.assert_array_equal(augment(picture(), 3), preprocess_of()(np.ascontiguousarray(picture()[::-1])))


def test_explicit_transforms_of_the_models_size_are_not_resampled_again() -> None:
    augment = build_augment("default", [{"CenterCrop": {"height": 32, "width": 32}}], preprocess_of())
    np.testing.assert_array_equal(augment(picture(60, 80), 3), picture(60, 80)[14:46, 24:56])


def test_explicit_transforms_may_be_nested_and_repeat_with_the_seed() -> None:
    chosen = {"OneOf": {"transforms": [{"RandomBrightnessContrast": {"p": 1.0}}, {"GaussianBlur": {"p": 1.0}}], "p": 1.0}}
    augment = build_augment("default", [{"RandomResizedCrop": {"size": [32, 32]}}, chosen], preprocess_of())
    views = [augment(picture(), seed).tobytes() for seed in range(20)]
    assert [augment(picture(), seed).tobytes() for seed in range(20)] == views
    assert len(set(views)) == 20


def test_all_mistakes_in_explicit_transforms_are_told_at_once_with_near_misses() -> None:
    nested = {"OneOf": {"transforms": [{"GausianBlur": {}}]}}
    found = refused(
        [{"HorizontalFlp": {}}, {"RandomCrop": {"height": 10}}, nested, {"A": {}, "B": {}}, {"HorizontalFlip": {"prob": 1}}]
    )
    where = "augmentation.transforms"
    assert "Did you mean 'HorizontalFlip'" in found[f"{where}[0]"]
    assert "width" in found[f"{where}[1].RandomCrop"]
    assert "'GaussianBlur'" in found[f"{where}[2].OneOf.transforms[0]"]
    assert found[f"{where}[3]"].startswith("expected one transform with its parameters")
    assert found[f"{where}[4].HorizontalFlip"] == "has no prob; its parameters are p."


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"Normalize": {}}], "must leave 8-bit RGB, not float32"),
        ([{"ToFloat": {}}], "must leave 8-bit RGB, not float32"),
        ([{"MaskDropout": {"p": 1.0}}], "requires"),
        ([{"RandomCrop": {"height": 5000, "width": 5000}}], "fails on an image of 400×300 pixels: Crop size"),
    ],
)
def test_what_cannot_work_on_photographs_is_found_before_training(transforms: Any, message: str) -> None:
    assert message in refused(transforms)["augmentation.transforms"]


@pytest.mark.parametrize("name", ["Lambda", "TextImage", "DualTransform", "Compose", "__builtins__", "check_for_updates"])
def test_only_transforms_of_images_are_offered(name: str) -> None:
    assert f"unknown transform {name!r}" in refused([{name: {}}])["augmentation.transforms[0]"]
    assert name not in offered_transforms()


@pytest.mark.slow
def test_every_offered_transform_that_needs_no_parameters_repeats_with_its_seed() -> None:
    slow = {"PiecewiseAffine", "Superpixels", "RandomFog"}
    names = [name for name in offered_transforms() if name not in slow]
    outcomes = {name: outcome([{name: {"p": 1.0}}]) for name in names}
    assert {name for name, said in outcomes.items() if "different views for one seed" in said} == set()
    assert sum(not said for said in outcomes.values()) > 75


def test_transforms_that_the_library_builds_in_other_ways_are_built_too() -> None:
    for name in ("MedianBlur", "RandomRotate90", "ToSepia", "HorizontalFlip", "Affine"):
        assert outcome([{name: {"p": 1.0}}]) == ""


def outcome(transforms: Any) -> str:
    """Why the transforms are refused; nothing if they are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library advises against some of its transforms
        try:
            build_augment("default", transforms, preprocess_of())
        except SpecError as error:
            return str(error)
    return ""


def test_a_transform_that_an_image_is_too_small_for_says_so_with_its_size() -> None:
    augment = build_augment("default", [{"RandomCrop": {"height": 200, "width": 200}}], preprocess_of())
    with pytest.raises(SpecError, match=r"augmentation.transforms: fails on an image of 80×60 pixels: Crop size"):
        augment(picture(60, 80), 0)


# -------------------------------------------------------------------------------------------------------------- people


def test_an_augmentation_that_makes_no_view_costs_no_import_of_its_libraries() -> None:
    code = (
        "import sys\n"
        "from finetune.bundle.preprocess import Preprocess\n"
        "from finetune.data.augment import build_augment\n"
        f"augment = build_augment('default', None, {preprocess_of()!r})\n"
        "assert augment.decode_short_side_px > 32\n"
        "assert not {'albumentations', 'cv2', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.longer
def test_importing_it_asks_no_package_index(tmp_path: Path) -> None:
    code = (
        "import urllib.request\n"
        "def refuse(*_, **__): raise SystemExit('went to the network')\n"
        "urllib.request.OpenerDirector.open = refuse\n"
        "import finetune.data.transforms\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
