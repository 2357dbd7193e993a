"""What one step is made of: parameter groups, randomness, averages, gradient signals, and how the machine computes."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest
import torch
from tiny_training import tiny_classifier, tiny_recipe
from torch import nn

from finetune.errors import InvalidInput
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze
from finetune.training import machine
from finetune.training.average import MovingAverage, copy_state, interpolate, loaded_state, recalibrate
from finetune.training.compute import resolve_device
from finetune.training.machine import (
    Numerics,
    Timing,
    candidate_numerics,
    choose_numerics,
    computing_with,
    fastest,
    place,
    prepare_images,
)
from finetune.training.mixing import mix, step_seed
from finetune.training.objectives import objective_of
from finetune.training.optim import build_optimizer, set_learning_rates
from finetune.training.recipe import Recipe, freeze_plan
from finetune.training.signals import StepMeter

LOSS = objective_of("multiclass").loss

PARTIAL = {
    "method": {"type": "partial", "stages": 1, "warm_head": False},
    "hyperparameters": {"weight_decay": 0.5, "n_epochs": 4},
}


def one_step(classifier: Classifier, recipe: Recipe, optimizer: torch.optim.Optimizer, step: int) -> None:
    phase, _ = recipe.phase_at(step)
    classifier.train()
    apply_freeze(classifier, freeze_plan(recipe, phase))
    set_learning_rates(optimizer, recipe, step)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(step))
    classifier(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_biases_and_norms_are_never_decayed_and_everything_that_trains_is_in_one_group() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 20, **PARTIAL)
    optimizer = build_optimizer(classifier, recipe)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay_of) == sum(len(group["params"]) for group in optimizer.param_groups)
    seen = 0
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            assert decay_of[id(parameter)] == (0.5 if parameter.ndim > 1 else 0.0)
            seen += 1
    assert seen == len(decay_of) > 4


def test_position_embeddings_are_not_decayed() -> None:
    classifier = tiny_classifier("test_vit")
    optimizer = build_optimizer(classifier, tiny_recipe(classifier, 20, method="full"))
    (group,) = [g for g in optimizer.param_groups if any(p is classifier.backbone.module.pos_embed for p in g["params"])]
    assert group["weight_decay"] == 0.0


def test_frozen_weights_have_no_optimiser_state_and_do_not_move() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 20, **PARTIAL)
    optimizer = build_optimizer(classifier, recipe)
    before = copy_state(classifier)
    one_step(classifier, recipe, optimizer, 0)
    top = {f"backbone.module.{name}" for name in classifier.backbone.stages[-1].parameters} | {"head.weight", "head.bias"}
    moved = {name for name, tensor in classifier.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert moved <= top
    assert all(parameter.requires_grad for parameter in optimizer.state)


def test_a_stage_that_thaws_later_is_neither_moved_nor_decayed_before() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 20, method={"type": "gradual", "epochs_per_stage": 1}, hyperparameters={"weight_decay": 0.9})
    optimizer = build_optimizer(classifier, recipe)
    stem = classifier.backbone.module.get_parameter(classifier.backbone.stages[0].parameters[0])
    before = stem.detach().clone()
    one_step(classifier, recipe, optimizer, 0)
    assert torch.equal(stem, before)
    one_step(classifier, recipe, optimizer, recipe.n_steps - recipe.steps_per_epoch)
    assert not torch.equal(stem, before)


def test_step_seeds_differ_and_repeat() -> None:
    seeds = {step_seed(seed, step) for seed in range(10) for step in range(100)}
    assert len(seeds) == 1000
    assert step_seed(3, 14) == step_seed(3, 14)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mixup_blends_each_image_with_the_one_whose_label_it_reports() -> None:
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    labels = torch.arange(5)
    mixed, other, share = mix(images, labels, 0.4, seed=1)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[other])
    again, _, same_share = mix(images, labels, 0.4, seed=1)
    assert torch.equal(again, mixed)
    assert share == same_share


def test_without_mixup_nothing_changes_and_the_loss_is_cross_entropy() -> None:
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    same, other, share = mix(images, labels, 0.0, seed=1)
    assert same is images
    logits = torch.randn(4, 3)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    assert torch.equal(LOSS(logits, labels, other, share, 0.1), expected)


def test_the_mixed_loss_is_cross_entropy_against_mixed_targets() -> None:
    logits, labels, other = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    targets = 0.3 * nn.functional.one_hot(labels, 3) + 0.7 * nn.functional.one_hot(other, 3)
    torch.testing.assert_close(LOSS(logits, labels, other, 0.3, 0.0), nn.CrossEntropyLoss()(logits, targets))


def test_after_its_half_life_the_average_is_half_way_to_a_constant() -> None:
    module = nn.BatchNorm1d(2)
    average = MovingAverage(module, half_life_steps=10)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(4.0)
        module.num_batches_tracked.fill_(9)
    for _ in range(10):
        average.update(module)
    torch.testing.assert_close(average.state["weight"], torch.full((2,), 2.0))
    torch.testing.assert_close(average.state["running_mean"], torch.full((2,), 2.0))
    assert average.state["num_batches_tracked"] == 9


def test_the_average_of_what_never_moves_is_that_to_the_bit() -> None:
    module = nn.Linear(30, 30)
    average = MovingAverage(module, half_life_steps=7.3)
    for _ in range(20):
        average.update(module)
    assert torch.equal(average.state["weight"], module.weight)


def test_held_weights_are_given_back_to_the_bit_even_after_an_error() -> None:
    module = nn.Linear(3, 3)
    own = copy_state(module)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    with loaded_state(module, zeros):
        assert not module.weight.any()
    assert torch.equal(module.weight, own["weight"])
    with pytest.raises(RuntimeError, match="shape"), loaded_state(module, zeros):
        module(torch.zeros(1, 99))
    assert torch.equal(module.weight, own["weight"])


def test_interpolation_ends_where_its_ends_are() -> None:
    start, end = ({"w": torch.randn(5), "n": torch.tensor(n)} for n in (1, 2))
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])
    torch.testing.assert_close(interpolate(start, end, 0.25)["w"], 0.75 * start["w"] + 0.25 * end["w"])
    assert interpolate(start, end, 0.25)["n"] == 2


def test_recalibration_sets_trainable_statistics_to_plain_means_and_leaves_the_others() -> None:
    frozen, trained = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    module = nn.Sequential(frozen, trained)
    frozen.eval()
    before = copy_state(frozen)
    batches = [torch.randn(16, 3) * 2 + 5 for _ in range(4)]
    recalibrate(module, batches, lambda network, batch: network(batch))
    seen = torch.stack([frozen(batch).mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(trained.running_mean, seen)
    assert torch.equal(frozen.running_mean, before["running_mean"])
    assert trained.momentum == 0.1


def test_signals_agree_with_norms_computed_one_by_one() -> None:
    layer = nn.Linear(4, 2)
    layer(torch.randn(3, 4)).sum().backward()
    before = copy_state(layer)
    meter = StepMeter({"head": list(layer.parameters())})
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    values = meter.measure()
    weights = torch.cat([before["weight"].flatten(), before["bias"]])
    gradients = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])  # type: ignore[union-attr]
    assert values["grad_norm/head"] == pytest.approx(float(gradients.norm()), rel=1e-5)
    assert values["weight_norm/head"] == pytest.approx(float(weights.norm()), rel=1e-5)
    assert values["update_ratio/head"] == pytest.approx(0.1 * float(gradients.norm() / weights.norm()), rel=1e-4)


def test_bfloat16_is_offered_only_where_the_hardware_has_it() -> None:
    without = candidate_numerics("cpu", "auto", 2, bfloat16=False)
    assert {numerics.precision for numerics in without} == {"float32"}
    with_it = candidate_numerics("cpu", "auto", 2, bfloat16=True)
    assert {(numerics.precision, numerics.channels_last) for numerics in with_it} == {
        ("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True),
    }  # fmt: skip
    assert {numerics.precision for numerics in candidate_numerics("cpu", "float32", 2, bfloat16=True)} == {"float32"}


def test_measuring_numerics_leaves_weights_and_statistics_alone() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 400, method={"type": "full", "bn": "train"}, hyperparameters={"n_epochs": 30})
    before = copy_state(classifier)
    numerics, timings = choose_numerics(classifier, recipe, device="cpu", threads=1)
    assert len(timings) >= 2
    assert numerics == fastest(timings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


def test_a_plainer_setting_is_kept_unless_another_is_clearly_faster() -> None:
    plain, other = Numerics(channels_last=False), Numerics(channels_last=True)
    assert fastest((Timing(plain, 100.0), Timing(other, 104.0))) == plain
    assert fastest((Timing(plain, 100.0), Timing(other, 106.0))) == other


def test_half_of_the_threads_are_taken_where_that_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 400, method="full", hyperparameters={"n_epochs": 30})
    rates = {8: 100.0, 4: 120.0}

    def pretend(classifier: Classifier, recipe: Recipe, candidates: Sequence[Numerics]) -> tuple[Timing, ...]:
        return tuple(Timing(numerics, rates[numerics.threads] + 50 * numerics.channels_last) for numerics in candidates)

    monkeypatch.setattr(machine, "measure", pretend)
    numerics, timings = choose_numerics(classifier, recipe, device="cpu", precision="float32", threads=8)
    assert numerics == Numerics("cpu", "float32", True, 4)
    assert [timing.numerics.threads for timing in timings] == [8, 8, 8, 4]
    rates[4] = 104.0
    assert choose_numerics(classifier, recipe, device="cpu", precision="float32", threads=8)[0].threads == 8


def test_a_short_run_is_not_measured() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 20, method="full", hyperparameters={"n_epochs": 1})
    assert choose_numerics(classifier, recipe, device="cpu", threads=2) == (Numerics("cpu", "float32", True, 2), ())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


def test_numerics_end_with_their_block() -> None:
    threads = torch.get_num_threads()
    with computing_with(Numerics(threads=1)):
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_gradients_do_not_depend_on_the_memory_layout(architecture: str) -> None:
    gradients = []
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    original = tiny_classifier(architecture, dropout=0.0)
    for channels_last in (False, True):
        numerics = Numerics(channels_last=channels_last)
        classifier = copy.deepcopy(original)
        classifier.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        classifier.train()
        classifier(prepare_images(classifier, images, numerics)).square().mean().backward()
        gradients.append([p.grad for p in classifier.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back after each step")
def test_while_memory_is_retained_large_blocks_come_from_the_heap_instead_of_fresh_mappings() -> None:
    """In a process of its own: a heap that other tests have grown has room for large blocks anyway."""
    program = textwrap.dedent("""
        import ctypes
        import torch
        from finetune.runtime.allocator import retaining_memory

        class Mallinfo2(ctypes.Structure):
            names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "u", "f", "uo", "fo", "k")
            _fields_ = [(name, ctypes.c_size_t) for name in names]

        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Mallinfo2

        def newly_mapped_bytes():
            before = libc.mallinfo2().hblkhd  # what the allocator has mapped in separate blocks
            block = torch.ones(9 * 1024 * 1024)  # 36 MiB: by itself glibc maps everything above 32
            return libc.mallinfo2().hblkhd - before if block.numel() else 0

        print(newly_mapped_bytes())
        with retaining_memory():
            print(newly_mapped_bytes())
        print(newly_mapped_bytes())
    """)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, during, after = (int(line) for line in ended.stdout.split())
    assert before >= 36 * 2**20
    assert during == 0
    assert after >= 36 * 2**20


def test_activations_are_out_of_place_only_where_autograd_would_copy() -> None:
    classifier = tiny_classifier()
    classifier.backbone.module.extra = nn.Sequential(nn.ReLU6(inplace=True), nn.ReLU(inplace=True))
    place(classifier, Numerics())
    relu6, relu = classifier.backbone.module.extra
    assert not relu6.inplace
    assert relu.inplace
