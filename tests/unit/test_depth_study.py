"""The depth study: networks that differ in nothing but depth and shortcuts, and sentences by rules that say what happened."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import shared_at, write_stripes

from finetune.errors import SpecError
from finetune.model.backbone import build_backbone
from finetune.model.depth import AIDS, DEPTHS, Block, DepthNetwork, network_name
from finetune.progress import Progress, silent
from finetune.report.depth_page import render_depth
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.studies.depth import DepthRequest, study_depth
from finetune.studies.depth.request import Network
from finetune.studies.depth.result import DepthStudy, NetworkResult, Shortcut, headline, paragraphs

# ── networks ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("aid", AIDS)
def test_a_residual_network_has_the_parameters_of_the_plain_one(aid: Any) -> None:
    plain, residual = (DepthNetwork(20, aid, shortcut) for shortcut in (False, True))
    shapes = [{name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} for network in (plain, residual)]
    assert shapes[0] == shapes[1]


def test_the_number_in_a_name_counts_layers_with_weights() -> None:
    for depth in DEPTHS:
        layers = [m for m in DepthNetwork(depth, "", True).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert len(layers) == depth


@pytest.mark.parametrize("aid", AIDS)
def test_a_residual_block_begins_as_the_identity(aid: Any) -> None:
    block = Block(8, 8, 1, aid, shortcut=True).eval()
    activation = torch.rand(2, 8, 6, 6)  # after a ReLU
    assert torch.equal(block(activation), activation)
    halved = Block(8, 16, 2, aid, shortcut=True).eval()(activation)
    assert torch.equal(halved[:, :8], activation[:, :, ::2, ::2])
    assert not halved[:, 8:].any()


def test_the_networks_are_backbones_whose_blocks_are_stages() -> None:
    backbone = build_backbone(network_name("residual", 14, "bn"), weights="none", input_size_px=32)
    assert [stage.name for stage in backbone.stages][:3] == ["stem", "blocks.0", "blocks.1"]
    assert len(backbone.stages) == 1 + 6


# ── requests ──────────────────────────────────────────────────────────────────────────────────────


def test_everything_wrong_with_a_request_is_said_at_once() -> None:
    with pytest.raises(SpecError) as refused:
        DepthRequest(Path("photos"), depths=(9,), kinds=("dense",), n_images=3, input_size_px=8, n_epochs=0)
    assert {problem.where for problem in refused.value.problems} == {"depths", "kinds", "size", "images", "epochs"}


def test_a_request_survives_json_and_names_its_command() -> None:
    request = DepthRequest(Path("photos"), depths=(8, 14), aids=("", "bn"), n_epochs=3, seed=4)
    assert DepthRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request.command == "finetune study depth photos --depths 8,14 --aids none,bn --epochs 3 --seed 4"
    assert DepthRequest(Path("photos")).command == "finetune study depth photos"


# ── sentences ─────────────────────────────────────────────────────────────────────────────────────


def made_up(errors: dict[str, float], degraded: set[str], gradients: tuple[float, ...] = (1e-3,) * 6) -> DepthStudy:
    """A study of the networks named, with their training errors."""
    request = DepthRequest(Path("photos"), depths=(8, 44), aids=("bn",))
    results = tuple(
        NetworkResult(
            network=network, run=Path("runs") / network.name, n_parameters=100_000, train_error=errors[network.name],
            train_error_se=0.01, val_error=errors[network.name] + 0.02, errors=((1.0, 0.5), (2.0, errors[network.name])),
            gradients=gradients, gradients_at_step=20, seconds=3.0,
            degraded_against="plain8_bn" if network.name in degraded else None,
            findings=("degradation",) if network.name in degraded else (),
        )
        for network in request.networks
    )  # fmt: skip
    plain, residual = errors["plain44_bn"], errors["residual44_bn"]
    shortcuts = (Shortcut("bn", 44, plain, residual, plain - residual, 0.01),)
    cost = {"wall_seconds": 60.0}
    return DepthStudy("some", Path("some"), request, "photos", 400, 100, 2, results, shortcuts, cost)


CURED = {"plain8_bn": 0.02, "residual8_bn": 0.02, "plain44_bn": 0.6, "residual44_bn": 0.03}


def test_degradation_and_its_cure_are_said_in_one_sentence() -> None:
    found = made_up(CURED, {"plain44_bn"})
    assert headline(found) == (
        "Plain networks degrade: with 44 layers 60% of the training images are predicted wrongly, with 8 layers 2%; identity "
        "shortcuts cure it: 3% with the same 44 layers."
    )
    text = " ".join(paragraphs(found))
    assert "adds no parameter, lowers the training error from 60.0% to 3.0% (57 ± 1 points" in text
    assert "This is not overfitting" in text
    assert "gradients do not vanish" in text


def test_where_nothing_degrades_that_is_said() -> None:
    found = made_up({**CURED, "plain44_bn": 0.02}, set())
    assert headline(found).startswith("No degradation on these images")
    text = " ".join(paragraphs(found))
    assert "the shortcut changes the training error little" in text
    assert "not overfitting" not in text


def test_networks_that_learnt_nothing_do_not_show_that_nothing_degrades() -> None:
    found = made_up(dict.fromkeys(CURED, 0.71), set())
    found = replace(found, networks=tuple(replace(one, findings=("underfitting",)) for one in found.networks))
    assert headline(found) == (
        "The effect of depth cannot be seen: all plain networks underfit (training error at least 71%). Train longer, with more "
        "--epochs, or on more images."
    )


def test_a_cure_that_fails_is_not_called_one() -> None:
    found = made_up({**CURED, "residual44_bn": 0.62}, {"plain44_bn"})
    assert headline(found).endswith("identity shortcuts do not help here: 62% with the same 44 layers.")
    found = made_up({**CURED, "residual44_bn": 0.5}, {"plain44_bn", "residual44_bn"})
    assert "some of those networks degrade too" in headline(found)


@pytest.mark.parametrize(
    ("gradients", "said"),
    [
        ((1e-9, 1e-8, 1e-6, 1e-5, 1e-3, 1e-3), "vanishing gradients"),
        ((1e3, 1e3, 1.0, 1.0, 1e-3, 1e-3), "exploding gradients"),
        ((0.0, 0.0, 0.0, 1e-9, 1e-6, 1e-3), "too small for float32"),
        ((0.0,) * 6, "every one of them is exactly zero"),
        ((1e-7,) * 6, "small all over"),
    ],
)
def test_gradients_are_put_into_words(gradients: tuple[float, ...], said: str) -> None:
    assert said in " ".join(paragraphs(made_up(CURED, {"plain44_bn"}, gradients)))


def test_the_page_is_one_file_with_pictures_and_every_figure() -> None:
    found = made_up(CURED, {"plain44_bn"})
    page = render_depth(found.to_dict(), "finetune study depth <photos>")
    assert page.count("data:image/svg+xml") == 3
    assert "&lt;photos&gt;" in page
    assert all(one.network.name in page for one in found.networks)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    only_plain = replace(found, networks=tuple(one for one in found.networks if one.network.kind == "plain"))
    assert render_depth({**only_plain.to_dict(), "networks": [one.to_dict() for one in only_plain.networks]}, "again")


# ── a whole study ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small_request(tmp_path_factory: pytest.TempPathFactory) -> DepthRequest:
    pictures = write_stripes(tmp_path_factory.mktemp("depth"), 120)
    return DepthRequest(pictures, depths=(8,), aids=("bn",), n_epochs=2, n_images=66)


def stop_in(child: str) -> Callable[[Progress], None]:
    def stop(update: Progress) -> None:
        if update.message.startswith(child):
            raise KeyboardInterrupt

    return stop


@pytest.mark.longer
def test_a_study_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path: Path, small_request: DepthRequest) -> None:
    straight = study_depth(small_request, shared_at(tmp_path / "a"), silent, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        study_depth(small_request, shared_at(tmp_path / "b"), stop_in("residual8_bn"), tmp_path / "stopped")
    done = sorted(path.parent.name for path in (tmp_path / "stopped").rglob("outcome.json"))
    assert done == ["plain8_bn"]
    resumed = study_depth(small_request, shared_at(tmp_path / "b"), silent, tmp_path / "stopped")

    assert [figures_of(one) for one in resumed.networks] == [figures_of(one) for one in straight.networks]
    assert resumed.n_train <= 66
    assert [one.network for one in straight.networks] == [
        Network(kind, "bn", depth) for kind in ("plain", "residual") for depth in (8,)
    ]
    document = read_json(tmp_path / "straight" / "depth.json")
    assert document == json.loads(json.dumps(straight.to_dict()))
    assert straight.report.read_text().startswith("<!doctype html>")
    before = read_json(tmp_path / "stopped" / "depth.json")
    assert study_depth(small_request, shared_at(tmp_path / "b"), silent, tmp_path / "stopped").to_dict() == before
    assert (RunDir(tmp_path / "straight").child("plain8_bn").diagnosis).exists()


def figures_of(one: NetworkResult) -> tuple[Any, ...]:
    return one.network, one.train_error, one.val_error, one.errors, one.gradients
