"""The traced graph: what it computes, what it carries, and what tracing leaves untouched."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from exporting import classifier_of, onnx_answers, scatter, torch_answers
from torch import nn

from finetune.errors import ExportError
from finetune.export import dry_run as dry_run_module
from finetune.export import graph as graph_module
from finetune.export.dry_run import dry_run_export, fingerprint, noise
from finetune.export.graph import DeployModule, Graph, fill, optimized, trace
from finetune.export.template import with_metadata
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze
from finetune.model.selection import FreezePlan
from finetune.runtime.session import open_session

SIZE_PX = (64, 64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def module() -> DeployModule:
    return DeployModule(classifier_of("test_resnet"))


@pytest.fixture(scope="module")
def graph(module: DeployModule) -> Graph:
    return trace(module)


def assert_answers_as_torch(graph: Graph, deployed: DeployModule) -> None:
    model = fill(graph, deployed)
    for batch in (1, 2, 5):
        images = noise(batch, SIZE_PX)
        expected, given = torch_answers(deployed, images), onnx_answers(model, images)
        assert list(given) == list(expected) == list(graph.outputs)
        assert np.ptp(expected["probs"], axis=1).min() > 0.02  # a uniform answer would prove nothing
        for name, values in expected.items():
            np.testing.assert_allclose(given[name], values, atol=5e-5, rtol=5e-5, err_msg=name)


def test_a_network_with_batch_norms_answers_as_torch_does_for_every_batch_size(module: DeployModule, graph: Graph) -> None:
    assert graph.outputs == ("probs", "logits", "cam", "embedding")
    assert_answers_as_torch(graph, module)


@pytest.mark.parametrize(
    ("architecture", "cam_kind"),
    [("test_convnext", "layernorm"), ("test_vit", "linear"), ("test_mambaout", None)],
)
def test_other_kinds_of_networks_answer_as_torch_does_for_every_batch_size(architecture: str, cam_kind: str | None) -> None:
    deployed = DeployModule(classifier_of(architecture))
    assert deployed.classifier.cam_kind == cam_kind
    assert ("cam" in deployed.outputs) == (cam_kind is not None)
    assert_answers_as_torch(trace(deployed), deployed)


def test_the_map_of_the_top_class_averages_to_its_logit(module: DeployModule, graph: Graph) -> None:
    given = onnx_answers(fill(graph, module), noise(5, SIZE_PX))
    top = given["logits"].argmax(1)
    rebuilt = given["cam"].mean((1, 2)) + module.classifier.head.bias.detach().numpy()[top]
    np.testing.assert_allclose(rebuilt, given["logits"][np.arange(5), top], atol=1e-5)
    assert given["cam"].std(axis=(1, 2)).min() > 1e-3  # a flat map would average to anything


def test_the_model_is_one_valid_file_that_takes_uint8_images(module: DeployModule, graph: Graph) -> None:
    proto = onnx.load_model_from_string(fill(graph, module))
    onnx.checker.check_model(proto, full_check=True)
    (images,) = proto.graph.input
    shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, images.type.tensor_type.elem_type, shape) == ("images", onnx.TensorProto.UINT8, ["batch", 64, 64, 3])
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_the_file_tells_nothing_about_the_machine_that_made_it(module: DeployModule, graph: Graph) -> None:
    model = fill(graph, module)
    assert b"stack_trace" not in model
    assert b"/finetune/" not in model


def test_metadata_travels_inside_the_file(module: DeployModule, graph: Graph) -> None:
    described = with_metadata(fill(graph, module), {"finetune.classes": '["a", "ü"]'})
    assert {entry.key: entry.value for entry in onnx.load_model_from_string(described).metadata_props} == {
        "finetune.classes": '["a", "ü"]'
    }


def test_new_weights_in_an_old_graph_give_the_bytes_of_a_new_export(module: DeployModule, graph: Graph) -> None:
    trained = copy.deepcopy(module)
    scatter(trained.classifier, seed=1)
    refilled = fill(graph, trained)
    assert refilled == fill(trace(trained), trained)
    assert refilled != fill(graph, module)


def test_weights_in_another_memory_order_give_the_same_bytes(module: DeployModule, graph: Graph) -> None:
    assert fill(graph, copy.deepcopy(module).to(memory_format=torch.channels_last)) == fill(graph, module)


def test_temperature_moves_probabilities_and_nothing_else(module: DeployModule, graph: Graph) -> None:
    images = noise(3, SIZE_PX)
    plain = onnx_answers(fill(graph, module), images)
    warm = onnx_answers(fill(graph, DeployModule(module.classifier, temperature=2.5)), images)
    expected = torch.softmax(torch.from_numpy(plain["logits"]) / 2.5, dim=1).numpy()
    np.testing.assert_allclose(warm["probs"], expected, atol=1e-6)
    np.testing.assert_array_equal(warm["logits"], plain["logits"])
    np.testing.assert_array_equal(warm["cam"], plain["cam"])


@pytest.mark.filterwarnings("error")
def test_a_dry_run_leaves_the_classifier_as_it_was_and_says_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    classifier = classifier_of("test_resnet")
    apply_freeze(classifier, FreezePlan(frozenset({classifier.backbone.stages[-1].index}), bn="train"))
    weights = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    flags = [part.training for part in classifier.modules()]
    trains = [parameter.requires_grad for parameter in classifier.parameters()]
    caplog.set_level(logging.WARNING)
    dry_run_export(classifier)
    assert set(flags) == set(trains) == {True, False}
    assert flags == [part.training for part in classifier.modules()]
    assert trains == [parameter.requires_grad for parameter in classifier.parameters()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in classifier.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


class Odd(nn.Module):
    """A classifier around one function that is hard to export, after global pooling."""

    def __init__(self, like: Classifier, oddity: object) -> None:
        super().__init__()
        self.backbone, self.head, self.cam_kind = like.backbone, nn.Linear(3, 2), None
        self.oddity = oddity

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2).float() / 255

    def explain(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        embedding = self.oddity(images.mean((2, 3)))  # type: ignore[operator]
        return self.head(embedding), embedding, None


@pytest.mark.parametrize(
    ("oddity", "says"),
    [
        (torch.special.bessel_j0, "ONNX has no counterpart for its operator prims.bessel_j0"),
        (lambda pooled: pooled if pooled.sum() > 3 else -pooled, "cannot be traced"),
        (lambda pooled: pooled.reshape(2, -1)[:, :3].repeat(pooled.shape[0] // 2, 1), "ONNX Runtime"),
    ],
    ids=["operator", "control flow", "constant batch"],
)
def test_what_onnx_cannot_express_is_one_sentence_that_names_the_backbone(
    module: DeployModule, oddity: object, says: str
) -> None:
    with pytest.raises(ExportError) as raised:
        dry_run_export(Odd(module.classifier, oddity))  # type: ignore[arg-type]
    assert raised.value.message.startswith("test_resnet cannot be")
    assert says in raised.value.message
    assert "\n" not in raised.value.message
    assert "another backbone" in raised.value.message


def test_more_weights_than_one_file_holds_are_refused_before_tracing(
    module: DeployModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_module, "_LARGEST_FILE_BYTES", 1000)
    with pytest.raises(ExportError, match="GiB of weights, and one ONNX file without external data holds 2 GiB"):
        trace(module)


class CachingAttention(nn.Module):
    """As LeViT does it: in eval mode a table made of weights is kept, until somebody calls `.train()`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3))
        self.cache: torch.Tensor | None = None

    def train(self, mode: bool = True) -> CachingAttention:
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.training:
            return pooled * (2 * self.table)
        self.cache = 2 * self.table if self.cache is None else self.cache
        return pooled * self.cache


def test_what_a_layer_cached_of_old_weights_is_not_exported(module: DeployModule) -> None:
    odd = Odd(module.classifier, CachingAttention()).eval()
    deployed = DeployModule(odd)  # type: ignore[arg-type]
    images = noise(2, SIZE_PX)
    before = torch_answers(deployed, images)  # fills the cache
    graph = dry_run_export(odd)  # type: ignore[arg-type]
    with torch.no_grad():
        odd.oddity.table.mul_(3)  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(onnx_answers(fill(graph, deployed), images)["embedding"], 3 * before["embedding"], rtol=1e-5)
    np.testing.assert_allclose(torch_answers(deployed, images)["embedding"], 3 * before["embedding"], rtol=1e-5)


def test_a_kept_graph_saves_tracing_the_same_architecture_again(
    tmp_path: Path, module: DeployModule, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    monkeypatch.setattr(dry_run_module, "trace", lambda module: traced.append(module) or graph)
    assert [dry_run_export(classifier_of("test_resnet", seed=seed), cache=tmp_path) for seed in (1, 2, 3)] == [graph] * 3
    assert len(traced) == 1


def test_a_kept_graph_is_compared_with_torch_once_for_each_backbones_weights(
    tmp_path: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    check = dry_run_module._check
    monkeypatch.setattr(dry_run_module, "trace", lambda module: graph)
    monkeypatch.setattr(dry_run_module, "_check", lambda graph, module: compared.append(module) or check(graph, module))
    for seed in (1, 1, 2, 1, 2):
        dry_run_export(classifier_of("test_resnet", seed=seed), cache=tmp_path)
    assert len(compared) == 2
    (kept,) = tmp_path.glob("*.onnx")
    kept.write_bytes(other_normalisation(graph))  # the note is of another graph, so it counts for nothing
    assert dry_run_export(classifier_of("test_resnet", seed=1), cache=tmp_path) == graph
    assert len(compared) == 4


def test_a_kept_graph_that_computes_something_else_is_traced_again(
    tmp_path: Path, module: DeployModule, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / f"{fingerprint(module)}.onnx"
    kept.write_bytes(other_normalisation(graph))
    monkeypatch.setattr(dry_run_module, "trace", lambda module: graph)
    assert dry_run_export(module.classifier, cache=tmp_path) == graph
    assert kept.read_bytes() == graph.proto


def other_normalisation(graph: Graph) -> bytes:
    """The graph with its first Mul turned into a Div: what a change in the code might do behind the fingerprint's back."""
    proto = onnx.load_model_from_string(graph.proto)
    next(node for node in proto.graph.node if node.op_type == "Mul").op_type = "Div"
    return proto.SerializeToString()


def test_the_fingerprint_follows_the_architecture_and_not_the_weights(module: DeployModule) -> None:
    same = fingerprint(module)
    assert same == fingerprint(DeployModule(classifier_of("test_resnet", seed=5)))
    assert same == fingerprint(DeployModule(classifier_of("test_resnet", num_classes=7)))
    others = [
        classifier_of("test_resnet", input_size_px=96),
        classifier_of("test_byobnet"),
        Classifier(module.classifier.backbone, 4, pooling="max"),
    ]
    assert len({same, *(fingerprint(DeployModule(other)) for other in others)}) == 4


@pytest.mark.parametrize("n_classes", [2, 7])
def test_a_graph_serves_any_number_of_classes(graph: Graph, n_classes: int) -> None:
    other = DeployModule(classifier_of("test_resnet", num_classes=n_classes), temperature=2.0)
    assert_answers_as_torch(graph, other)
    model = onnx.load_model_from_string(fill(graph, other))
    onnx.checker.check_model(model, full_check=True)
    declared = {value.name: value.type.tensor_type.shape.dim for value in model.graph.output}
    assert declared["probs"][1].dim_value == declared["logits"][1].dim_value == n_classes


@pytest.mark.longer
def test_attention_inside_windows_is_exported_without_the_fused_form() -> None:
    deployed = DeployModule(classifier_of("nest_tiny", input_size_px="auto"))
    fused = [part.fused_attn for part in deployed.modules() if hasattr(part, "fused_attn")]
    traced = trace(deployed)
    images = noise(1, deployed.classifier.backbone.preprocess.input_size_px)
    expected, given = torch_answers(deployed, images), onnx_answers(fill(traced, deployed), images)
    for name, values in expected.items():
        np.testing.assert_allclose(given[name], values, atol=1e-4, rtol=1e-4, err_msg=name)
    assert len(fused) > 0
    assert [part.fused_attn for part in deployed.modules() if hasattr(part, "fused_attn")] == fused


def test_a_value_that_is_clipped_twice_keeps_both_pairs_of_bounds() -> None:
    """onnxscript 0.7 names the bounds after the value, and drops the first pair."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        clips (float[N] images) => (float[N] a, float[N] b)
        <float low = {0.0}, float high = {1.0}, float lower = {-2.0}, float higher = {3.0}> {
            y = Mul(images, images)
            m = Max(y, low)
            a = Min(m, high)
            n = Max(y, lower)
            b = Min(n, higher)
        }"""
    )
    proto = ir.to_proto(optimized(ir.from_proto(model)))
    onnx.checker.check_model(proto, full_check=True)
    images = np.array([0.5, 1.5, 3.0], np.float32)
    a, b = open_session(proto.SerializeToString()).run(["a", "b"], {"images": images})
    np.testing.assert_allclose(a, (images**2).clip(0, 1))
    np.testing.assert_allclose(b, (images**2).clip(-2, 3))


@pytest.mark.parametrize(("difference", "refused"), [(0.5, False), (5.0, True)])
def test_rounding_of_a_map_is_relative_to_the_features_and_weights_that_cancel_in_it(difference: float, refused: bool) -> None:
    cam = np.full((1, 7, 7), 10.0, np.float32)
    expected = [np.array([[3.0, 1.0]], np.float32), cam, np.full((1, 4), 1000.0, np.float32)]
    computed = [expected[0], cam + np.float32(difference), expected[2]]
    weight = np.full((2, 4), 0.5, np.float32)  # each row has the norm 1
    outputs = ("logits", "cam", "embedding")
    if refused:
        with pytest.raises(ExportError, match="its cam differs by 5"):
            dry_run_module.compare("net", outputs, expected, computed, weight)
    else:
        dry_run_module.compare("net", outputs, expected, computed, weight)
