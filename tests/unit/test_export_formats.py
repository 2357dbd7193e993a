"""Models leave in other formats and come back: timm's folders, single files, and the next job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from exporting import FACTS, classifier_of, export_classifier, pictures
from standin import write_bundle
from tiny_runs import carry_out_at, shared_at, tiny_spec, weights_of, write_stripes

from finetune.bundle.manifest import WEIGHTS, read_manifest
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import Registry
from finetune.bundle.weights import find_origin
from finetune.errors import Conflict, InvalidInput, MissingExtra, NotFound, SpecError, UnknownBackbone, WeightsError
from finetune.export.formats import FORMATS, write_format
from finetune.export.formats.bundle import Opened
from finetune.model.backbone import build_backbone
from finetune.model.tensors import backbone_tensors, read_tensors
from finetune.model.weights import resolve_weights
from finetune.runs.build import build_network
from finetune.runs.prepare import prepare
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a network all of whose weights were trained."""
    folder = tmp_path_factory.mktemp("trained")
    export_classifier(classifier_of("test_efficientnet"), FACTS, pictures(folder, 4), folder / "bundle")
    return folder / "bundle"


def test_a_timm_folder_loads_with_timm_and_gives_the_same_logits(bundle: Path, tmp_path: Path) -> None:
    write_format("timm", Opened(bundle), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    predictor, manifest = Predictor.load(bundle), read_manifest(bundle)
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    np.testing.assert_allclose(logits, predictor.run(images).logits, atol=1e-4)
    assert config["input_size"] == (3, 64, 64)
    assert config["crop_pct"] == manifest.preprocess.crop_fraction
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list(manifest.classes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: timm" in card
    assert "local-dir:" in card


def test_a_timm_folder_is_a_backbone_with_its_weights(bundle: Path, tmp_path: Path) -> None:
    write_format("timm", Opened(bundle), tmp_path / "out")
    backbone = build_backbone(f"local-dir:{tmp_path / 'out'}")
    own = Opened(bundle).classifier.backbone
    for name, tensor in own.module.state_dict().items():
        assert torch.equal(backbone.module.state_dict()[name], tensor), name
    assert backbone.preprocess.input_size_px == (64, 64)
    assert backbone.weights.source == "file"
    with pytest.raises(UnknownBackbone, match=r"no config\.json there"):
        build_backbone(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnknownBackbone, match=r"its config\.json is not timm's"):
        build_backbone(f"local-dir:{tmp_path}")


def test_a_name_on_the_hub_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"hf-hub:timm/resnet18\.a1_in1k could not be downloaded .*HF_HUB_OFFLINE"):
        resolve_weights("hf-hub:timm/resnet18.a1_in1k", cache=tmp_path)


def test_one_file_of_tensors_holds_the_whole_network_and_comes_back(bundle: Path, tmp_path: Path) -> None:
    write_format("safetensors", Opened(bundle), tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    own = Opened(bundle).classifier
    assert torch.equal(tensors["head.weight"], own.head.weight)
    again = build_backbone("test_efficientnet", weights=str(tmp_path / "out" / "model.safetensors"), input_size_px=64)
    for name, tensor in own.backbone.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name


def test_every_format_is_offered_and_what_it_lacks_is_said(bundle: Path, tmp_path: Path) -> None:
    from finetune.cli.exporting import FORMATS as OFFERED

    assert tuple(FORMATS) == OFFERED
    write_format("onnx", Opened(bundle), tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    with pytest.raises(Conflict, match="exists"):
        write_format("onnx", Opened(bundle), tmp_path / "out")
    with pytest.raises(InvalidInput, match=r"no format 'tim'.*Did you mean 'timm'"):
        write_format("tim", Opened(bundle), tmp_path / "other")
    with pytest.raises(MissingExtra, match="npm install onnxruntime-web"):
        write_format("web", Opened(bundle, tmp_path / "nowhere"), tmp_path / "other")
    with pytest.raises(NotFound, match=r"no dist/ort\.wasm\.bundle\.min\.mjs"):
        write_format("web", Opened(bundle, tmp_path), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_page_for_browsers_holds_model_and_runtime(bundle: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "onnxruntime-web"
    (runtime / "dist").mkdir(parents=True)
    (runtime / "dist" / "ort.wasm.bundle.min.mjs").write_text("export const env = 1; // </script>")
    (runtime / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm")
    write_format("web", Opened(bundle, runtime), tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "{{" not in page
    assert page.count("</script>") == 5  # the facts, three files and the page's own
    facts = json.loads(page.partition('id="facts">')[2].partition("</script>")[0])
    assert facts["classes"] == list(FACTS.classes)
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


def test_other_weights_than_the_models_are_not_exported(bundle: Path, tmp_path: Path) -> None:
    from shutil import copytree

    damaged = copytree(bundle, tmp_path / "bundle")
    data = bytearray((damaged / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (damaged / WEIGHTS).write_bytes(data)
    with pytest.raises(WeightsError, match="changed or cut short"):
        write_format("safetensors", Opened(damaged), tmp_path / "out")
    Predictor.load(damaged)  # serving does not read them


def test_a_bundle_of_an_earlier_release_keeps_no_weights(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with pytest.raises(WeightsError, match="made by an earlier release and keeps no weights"):
        find_origin(str(tmp_path / "bundle"), tmp_path)
    with pytest.raises(NotFound, match="neither a bundle nor a run that exported a model"):
        find_origin(str(tmp_path / "nothing"), tmp_path)
    with pytest.raises(NotFound, match="no model 'flowers'"):
        find_origin("flowers@1", tmp_path)


def test_a_reference_that_can_move_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        tiny_spec(tmp_path, model="flowers@champion")
    assert "give a registered model with the number of its version" in caught.value.problems[0].message
    with pytest.raises(SpecError) as caught:
        tiny_spec(tmp_path, model={"backbone": "flowers@3", "weights": "none"})
    assert "brings its own weights" in caught.value.problems[0].message


@pytest.mark.longer
def test_a_job_starts_from_a_model_of_ones_own_and_says_so(tmp_path: Path) -> None:
    stripes = write_stripes(tmp_path, 36)
    home = tmp_path / "home"
    shared = shared_at(home)
    common = {"suffix": "stripes", "export": {"register_model": "always"}}
    begun = tiny_spec(stripes, method={"type": "full"}, hyperparameters={"n_epochs": 1}, **common)
    first = carry_out_at(home, begun, RunDir(tmp_path / "first"))
    assert (first.model, first.version) == ("stripes", "1")

    from_first = {"model": "stripes@1", "compute": begun.compute.model_dump(), **common}
    second_spec = tiny_spec(stripes, **from_first)
    second = carry_out_at(home, second_spec, RunDir(tmp_path / "second"))
    origin = find_origin("stripes@1", shared.workspace.models)
    kept = backbone_tensors(read_tensors(origin))
    frozen = backbone_tensors(read_tensors(find_origin("stripes@2", shared.workspace.models)))
    assert kept.keys() == frozen.keys()
    assert all(np.array_equal(kept[name], frozen[name]) for name in kept)
    manifest = read_manifest(second.bundle)
    assert manifest.backbone["name"] == "test_efficientnet"
    assert manifest.backbone["weights"]["identifier"] == "stripes@1"
    assert manifest.backbone["weights"]["origin"]["model"] == "stripes@1"
    assert manifest.backbone["weights"]["origin"]["weights"]["source"] == "none"
    assert read_json(tmp_path / "second" / "resolved.json")["values"]["model.origin"] == "stripes@1"
    card = (second.bundle / "README.md").read_text()
    assert "started from | stripes@1; pretrained weights: random initialisation" in card
    assert "no licence of weights applies" in card

    # Without torch, from what the second run has recorded, the bundle keeps the same weights.
    third = carry_out_at(home, second_spec.model_copy(update={"seed": 1}), RunDir(tmp_path / "third"))
    assert weights_of(third.bundle) != ""
    assert (third.bundle / WEIGHTS).read_bytes() == (second.bundle / WEIGHTS).read_bytes()

    # The same classes: a head that is not solved begins as the model's own.
    spec = tiny_spec(stripes, **{**from_first, "method": {"type": "partial", "warm_head": False}})
    network = build_network(spec, "multiclass", 3, shared)
    own = network.own_head(("class2", "class0", "class1"))
    assert own is not None
    expected = read_tensors(origin)["head.weight"]
    assert np.array_equal(own.weight, expected[[2, 0, 1]])
    assert network.own_head(("class0", "class1", "other")) is None
    assert prepare(spec, shared).network.facts.weights["identifier"] == "stripes@1"

    write_format("timm", Opened(Registry(shared.workspace.models).locate("stripes@2")), tmp_path / "timm")


def test_a_folder_whose_architecture_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": 5}')
    with pytest.raises(UnknownBackbone, match=r"its config\.json is not timm's"):
        build_backbone(f"local-dir:{tmp_path}")
