"""A predictor answers as its model does, and refuses a bundle that is not what was exported, saying which part is wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import AWKWARD, READABLE, REFUSED
from onnx import external_data_helper, helper, numpy_helper
from tiny_bundle import CLASSES, PREPROCESS, logits_of, reseal, self_test_files, tiny_model, weights, write_tiny_bundle

from finetune.bundle.manifest import SELF_TEST
from finetune.bundle.predictor import PIXELS_TOLERANCE, Predictor, Seen, read_seen, read_self_test, write_self_test
from finetune.bundle.preprocess import Preprocess
from finetune.errors import BundleError, ImageError, InvalidInput
from finetune.runtime.session import open_session


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("bundle")
    write_tiny_bundle(folder)
    return Predictor.load(folder)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def reference(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(maps, embedding, logits) of the tiny model in plain numpy, float64."""
    tensors = weights()
    normal = (batch.astype(np.float64) / 255 - PREPROCESS.mean) / PREPROCESS.std  # (B, 32, 32, 3)
    windows = np.lib.stride_tricks.sliding_window_view(normal, (3, 3), axis=(1, 2))[:, ::4, ::4]  # (B, 8, 8, 3, 3, 3)
    maps = np.maximum(np.einsum("bhwcyx,dcyx->bdhw", windows, tensors["kernel"]), 0)
    embedding = maps.mean(axis=(2, 3))
    return maps, embedding, embedding @ tensors["head"].T + tensors["bias"]


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_outputs_equal_the_same_network_in_numpy(predictor: Predictor, count: int) -> None:
    batch = images(count)
    outputs = predictor.run(batch)
    maps, embedding, logits = reference(batch)
    np.testing.assert_allclose(outputs.embedding, embedding, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs.probs.sum(axis=1), 1, atol=1e-6)
    top = logits.argmax(axis=1)
    np.testing.assert_allclose(outputs.cam, np.einsum("bdhw,bd->bhw", maps, weights()["head"][top]), rtol=1e-3, atol=1e-4)


def test_the_mean_of_the_activation_map_plus_the_bias_is_the_logit(predictor: Predictor) -> None:
    outputs = predictor.run(images(9))
    top = outputs.logits.argmax(axis=1)
    np.testing.assert_allclose(outputs.cam.mean(axis=(1, 2)) + weights()["bias"][top], outputs.logits.max(axis=1), atol=1e-4)


def test_a_prediction_names_the_most_probable_classes_first(predictor: Predictor) -> None:
    data, _ = AWKWARD["alpha.png"]
    prediction = predictor.predict(data, top_k=3)
    np.testing.assert_array_equal(prediction.image, PREPROCESS.load(data))
    probs = predictor.run(PREPROCESS.load(data)[None]).probs[0]
    assert prediction.labels == tuple((CLASSES[index], float(probs[index])) for index in np.argsort(-probs)[:3])
    assert prediction.cam.shape == (8, 8)
    assert (prediction.name, prediction.version) == ("trees", None)


def test_asking_for_more_classes_than_there_are_gives_all_of_them(predictor: Predictor) -> None:
    labels = predictor.predict(AWKWARD["plain.png"][0], top_k=100).labels
    assert sorted(label for label, _ in labels) == sorted(CLASSES)


def test_a_model_without_activation_map_predicts_without_one(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle", cam=False)
    predictor = Predictor.load(tmp_path / "bundle")
    assert predictor.run(images(2)).cam is None
    assert predictor.predict(AWKWARD["plain.png"][0]).cam is None


@pytest.mark.parametrize("name", READABLE)
def test_every_readable_file_is_predicted(predictor: Predictor, name: str) -> None:
    prediction = predictor.predict(AWKWARD[name][0])
    assert sum(probability for _, probability in prediction.labels) == pytest.approx(1, abs=1e-5)


def test_every_refused_file_raises_an_image_error(predictor: Predictor) -> None:
    for name in REFUSED:
        with pytest.raises(ImageError):
            predictor.predict(AWKWARD[name][0])


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
    ],
)
def test_pixels_of_another_shape_or_type_are_refused(predictor: Predictor, wrong: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match=r"the model takes \(B, 32, 32, 3\) uint8, given"):
        predictor.run(wrong)


def test_top_k_below_one_is_refused(predictor: Predictor) -> None:
    with pytest.raises(InvalidInput, match="top_k must be at least 1, given 0"):
        predictor.predict(AWKWARD["plain.png"][0], top_k=0)


def test_threads_that_share_a_predictor_get_the_answers_of_one_alone(predictor: Predictor) -> None:
    files = [AWKWARD[name][0] for name in READABLE if len(AWKWARD[name][0]) < 100_000]
    alone = [predictor.predict(data) for data in files]
    answers: list[list[tuple[tuple[str, float], ...]]] = [[] for _ in range(6)]

    def ask(mine: list[tuple[tuple[str, float], ...]]) -> None:
        mine.extend(predictor.predict(data).labels for data in files)

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files) >= 40
    for mine in answers:
        assert mine == [prediction.labels for prediction in alone]


# ---- what loading refuses ----------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Predictor.load(folder)
    assert str(folder) in caught.value.message
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "probe.npz"])
def test_one_changed_bit_in_a_file_is_named(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert f"{name}: has sha256" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "probe.npz"])
def test_a_file_cut_short_is_named(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    assert f"{name}: has sha256" in refusal(bundle)
    assert "cut short" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "probe.npz"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert f"{name}: cannot be read (No such file or directory)" in refusal(bundle)


def test_everything_wrong_is_said_at_once(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "probe.npz").write_bytes(b"")
    assert "model.onnx: cannot be read" in refusal(bundle)
    assert "probe.npz: has sha256" in refusal(bundle)


def test_a_folder_without_manifest_is_no_bundle(bundle: Path) -> None:
    (bundle / "bundle.json").unlink()
    assert "not a bundle, bundle.json cannot be read (No such file or directory)" in refusal(bundle)


def test_a_manifest_cut_short_is_not_json(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text[: len(text) // 2])
    assert "bundle.json is not JSON" in refusal(bundle)


def test_a_manifest_without_checksums_is_refused(bundle: Path) -> None:
    given = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**given, "files": {}}))
    assert "model.onnx: bundle.json has no checksum for it" in refusal(bundle)


def test_swapped_class_names_are_seen_because_the_model_carries_them_too(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace('"ash"', '"oak"'))
    assert 'classes: bundle.json says ["oak", "beech"' in refusal(bundle)
    assert 'model.onnx says ["ash", "beech"' in refusal(bundle)


def test_a_changed_preprocessing_is_seen_because_the_model_carries_it_too(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace("0.875", "0.9"))
    assert "preprocess: bundle.json says" in refusal(bundle)


def replace_model(folder: Path, model: onnx.ModelProto) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)


def test_other_weights_under_right_checksums_fail_the_model_self_test_alone(bundle: Path) -> None:
    tensors = weights()
    tensors["kernel"] = tensors["kernel"] * np.float32(1.01)
    replace_model(bundle, tiny_model(tensors=tensors))
    said = refusal(bundle)
    assert "model self-test (arrays → logits): logits are off by" in said
    assert "image self-test" not in said


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_another_provider_comes_before_the_cpu_and_must_compute_the_same(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    asked: list[Sequence[str]] = []

    class Accelerated:
        """A session of another provider, whose logits are `shift` larger."""

        def __init__(self, model: bytes, *, threads: int, providers: Sequence[str]) -> None:
            asked.append(providers)
            self.session = open_session(model, threads=threads, providers=["CPUExecutionProvider"])

        def run(self, names: list[str], given: dict[str, np.ndarray]) -> list[np.ndarray]:
            found = self.session.run(names, given)
            return [values + shift if name == "logits" else values for name, values in zip(names, found, strict=True)]

        def __getattr__(self, name: str) -> object:
            return getattr(self.session, name)

    monkeypatch.setattr("finetune.bundle.predictor.open_session", Accelerated)
    if shift:
        with pytest.raises(BundleError, match=r"logits are off by 0\.1"):
            Predictor.load(bundle, provider="cuda")
    else:
        assert Predictor.load(bundle, provider="cuda").predict(self_test_files()[0]).labels
    assert asked == [["CUDAExecutionProvider", "CPUExecutionProvider"]]


def test_a_model_that_gives_nan_fails_the_model_self_test(bundle: Path) -> None:
    tensors = weights()
    tensors["bias"] = np.full_like(tensors["bias"], np.nan)
    replace_model(bundle, tiny_model(tensors=tensors))
    assert "model self-test (arrays → logits): logits are off by nan" in refusal(bundle)


def with_self_test(folder: Path, files: list[bytes], arrays: np.ndarray) -> None:
    """A self-test whose logits are right for its arrays, whatever the files are."""
    write_self_test(folder / "probe.npz", files, arrays, logits_of(tiny_model(), arrays))
    reseal(folder)


WRONG_PATHS = {
    "another filter": Preprocess(**{**vars(PREPROCESS), "interpolation": "bilinear"}),
    "another crop": Preprocess(**{**vars(PREPROCESS), "crop_fraction": 0.9}),
    "another framing": Preprocess(**{**vars(PREPROCESS), "resize": "squash"}),
    "no antialiasing": Preprocess(**{**vars(PREPROCESS), "interpolation": "nearest"}),
}


@pytest.mark.parametrize("wrong", WRONG_PATHS)
def test_another_image_path_fails_the_image_self_test_alone(bundle: Path, wrong: str) -> None:
    files = self_test_files()
    with_self_test(bundle, files, np.stack([WRONG_PATHS[wrong].load(data) for data in files]))
    said = refusal(bundle)
    assert "image self-test 1 (bytes → array): off by" in said
    assert "model self-test" not in said


def test_swapped_channels_fail_the_image_self_test_alone(bundle: Path) -> None:
    files = self_test_files()
    with_self_test(bundle, files, np.stack([PREPROCESS.load(data)[..., ::-1] for data in files]))
    assert "image self-test 0 (bytes → array): off by" in refusal(bundle)


def test_an_ignored_orientation_fails_the_image_self_test_of_the_turned_file(bundle: Path) -> None:
    files = self_test_files()
    arrays = np.stack([PREPROCESS.load(data) for data in files])
    arrays[0] = np.rot90(arrays[0])
    with_self_test(bundle, files, arrays)
    said = refusal(bundle)
    assert "image self-test 0" in said
    assert "image self-test 1" not in said


def test_a_last_bit_of_difference_in_decoding_is_allowed(bundle: Path) -> None:
    files = self_test_files()
    arrays = np.stack([PREPROCESS.load(data) for data in files])
    arrays.reshape(-1)[:: round(2 / PIXELS_TOLERANCE)] ^= 1
    with_self_test(bundle, files, arrays)
    Predictor.load(bundle)


def test_a_self_test_file_that_cannot_be_decoded_fails_the_image_probe(bundle: Path) -> None:
    files = [*self_test_files()[:2], b"nothing"]
    with_self_test(bundle, files, np.stack([PREPROCESS.load(data) for data in self_test_files()]))
    assert "image self-test 2 (bytes → array): cannot be decoded here: this is not an image" in refusal(bundle)


def test_a_model_of_another_input_size_does_not_belong(bundle: Path) -> None:
    other = Preprocess(**{**vars(PREPROCESS), "input_size_px": (48, 48)})
    replace_model(bundle, tiny_model(other))
    assert "inputs: bundle.json says [('images', 'tensor(uint8)', [32, 32, 3])], the model takes" in refusal(bundle)


def test_a_model_with_another_number_of_classes_does_not_belong(bundle: Path) -> None:
    replace_model(bundle, tiny_model(tensors=weights(n_classes=7)))
    assert "classes: bundle.json names 5, the model's logits have 7" in refusal(bundle)


def test_a_model_without_an_output_that_the_manifest_names_does_not_belong(bundle: Path) -> None:
    replace_model(bundle, tiny_model(cam=False))
    assert "outputs: bundle.json says ['probs', 'logits', 'cam', 'embedding'], the model gives" in refusal(bundle)


def test_a_file_that_is_no_model_is_refused_in_one_sentence(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"not a model")
    reseal(bundle)
    assert "cannot open model.onnx" in refusal(bundle)


def test_a_model_with_an_operator_set_of_the_future_is_refused(bundle: Path) -> None:
    model = tiny_model()
    model.opset_import[0].version = 9999
    replace_model(bundle, model)
    assert "cannot open model.onnx" in refusal(bundle)


def test_a_model_with_weights_in_another_file_is_refused(bundle: Path) -> None:
    model = tiny_model()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "kernel")
    (bundle / "secret.bin").write_bytes(numpy_helper.to_array(tensor).tobytes())
    external_data_helper.set_external_data(tensor, "secret.bin")
    tensor.ClearField("raw_data")
    replace_model(bundle, model)
    assert "keeps weights in other files" in refusal(bundle)


def test_a_note_with_the_key_location_is_not_taken_for_external_data(bundle: Path) -> None:
    model = tiny_model()
    helper.set_model_props(model, {"finetune.location": "1"})
    replace_model(bundle, model)
    Predictor.load(bundle)


def test_a_self_test_that_is_no_archive_is_refused(bundle: Path) -> None:
    (bundle / "probe.npz").write_bytes(b"PK\3\4 not an archive")
    reseal(bundle)
    assert "probe.npz cannot be read" in refusal(bundle)


def test_a_self_test_with_a_pickle_inside_is_refused_unopened(bundle: Path) -> None:
    np.savez(
        bundle / "probe.npz",
        lengths=np.array([1]),
        encoded=np.array([Path()], dtype=object),
        images=images(1),
        logits=np.zeros((1, 5)),
    )
    reseal(bundle)
    assert "allow_pickle=False" in refusal(bundle)


def test_a_self_test_without_images_is_refused(bundle: Path) -> None:
    write_self_test(bundle / "probe.npz", [], images(0), np.zeros((0, 5), np.float32))
    reseal(bundle)
    assert "probe.npz holds 0 files, 0 arrays and 0 logits" in refusal(bundle)


def test_a_self_test_reads_back_as_it_was_written(tmp_path: Path) -> None:
    files, arrays = [b"one", b"", b"three"], images(3)
    logits = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    write_self_test(tmp_path / "probe.npz", files, arrays, logits)
    known = read_self_test(tmp_path / "probe.npz")
    assert known.encoded == tuple(files)
    np.testing.assert_array_equal(known.images, arrays)
    np.testing.assert_array_equal(known.logits, logits)


def test_a_bundle_knows_the_images_that_it_was_made_with_by_their_bytes(tmp_path: Path) -> None:
    train, val, other = (hashlib.sha256(name.encode()).hexdigest() for name in ("train", "val", "other"))
    (tmp_path / "one").mkdir()
    arrays = [b"x"], np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2), np.float32)
    write_self_test(tmp_path / "one" / SELF_TEST, *arrays, Seen.of([train, ""], [val]))
    seen = read_seen(tmp_path / "one")
    assert seen is not None
    assert seen == Seen.of([train], [val])
    assert [(seen.trained_on(digest), seen.chosen_on(digest)) for digest in (train, val, other)] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip


def test_equal_sets_of_images_are_equal_files_and_an_older_bundle_does_not_say(tmp_path: Path) -> None:
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(9)]
    for folder, order in (("one", digests), ("two", digests[::-1])):
        (tmp_path / folder).mkdir()
        arrays = [b"x"], np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2), np.float32)
        write_self_test(tmp_path / folder / SELF_TEST, *arrays, Seen.of(order, []))
    assert (tmp_path / "one" / SELF_TEST).read_bytes() == (tmp_path / "two" / SELF_TEST).read_bytes()
    with np.load(tmp_path / "one" / SELF_TEST) as arrays:
        np.savez(tmp_path / "two" / SELF_TEST, **{name: arrays[name] for name in arrays if not name.startswith("seen")})
    assert read_seen(tmp_path / "two") is None
