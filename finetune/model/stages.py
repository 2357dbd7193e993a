"""Find the coarse stages of any timm architecture, in the order of the forward pass.

One forward pass is traced to find the chain: the modules that each pass one activation to the next, from the stem to the
features. timm's ``group_matcher(coarse=True)`` says which of them belong together; where its groups are single layers (VGG,
Inception), they are merged into the blocks that the papers name. Every parameter and buffer belongs to exactly one stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

STEM = "stem"

# Families whose coarse groups are single layers: (stage, regular expression for its modules), in the order of the forward pass.
_NAMED_BLOCKS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "InceptionV3": ((STEM, r"Conv2d|Pool"), ("Mixed_5", r"Mixed_5"), ("Mixed_6", r"Mixed_6"), ("Mixed_7", r"Mixed_7")),
    "InceptionV4": (
        (STEM, r"features\.[0-5]$"),
        ("inception_a", r"features\.[6-9]$"),
        ("inception_b", r"features\.1[0-7]$"),
        ("inception_c", r"features\.(1[89]|2[01])$"),
    ),
    "InceptionResnetV2": (
        (STEM, r"conv2d_[1-4]|maxpool"),
        ("inception_a", r"mixed_5b|repeat\."),
        ("inception_b", r"mixed_6a|repeat_1\."),
        ("inception_c", r"mixed_7a|repeat_2\.|block8|conv2d_7b"),
    ),
}
_SPLIT_AT_POOLS = ("VGG",)


@dataclass(frozen=True)
class Stage:
    """A coarse part of a backbone; stage 0 is the stem. Names of modules and tensors are relative to the timm module."""

    index: int
    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    n_parameters: int
    output_shape: tuple[int, ...]  # of the activation of one image at the end of the stage


@dataclass(frozen=True)
class Call:
    """The call of one module in a traced forward pass."""

    name: str
    caller: str  # name of the calling module; empty for the network itself
    given: Any  # the positional argument, or a tuple of several
    options: Mapping[str, Any]  # the keyword arguments
    returned: list[Any] = field(default_factory=list, compare=False)  # the one result, once the call has returned


@dataclass(frozen=True)
class ChainModule:
    """A module of the chain, called as ``module(activation, **options)``; tensors among the options are constants."""

    name: str
    options: Mapping[str, Any]
    input_shape: tuple[int, ...]  # of one image
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The division of a backbone into stages.

    `chain[i]` belongs to stage `chain_stages[i]`, which never decreases. From `chain[replay_from]` on, the chain alone computes
    the features: the input of each module is the output of the one before, and the last module returns the features.
    """

    stages: tuple[Stage, ...]
    chain: tuple[ChainModule, ...]
    chain_stages: tuple[int, ...]
    replay_from: int
    module_stages: Mapping[str, frozenset[int]]  # by module name: its stage; for a container, all stages inside it
    tensor_stage: Mapping[str, int]  # by name of a parameter or buffer


@dataclass(frozen=True)
class Trace:
    """The record of one forward pass of one image through a backbone."""

    calls: tuple[Call, ...]  # during forward_features
    head_calls: tuple[str, ...]  # names of the modules called by forward_head
    image: Tensor
    features: Any  # a tensor, or a list of tensors if the network ends in several
    pre_logits: Tensor  # (1, D) the input of the original classifier


def record_calls(module: nn.Module, image: Tensor) -> Trace:
    """Run one image (1, 3, h, w) through a timm backbone in eval mode and record every module call.

    If gradients are enabled, `requires_grad` of the recorded tensors shows which were computed from parameters.
    """
    calls: list[Call] = []
    open_calls: list[Call] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            caller = open_calls[-1].name if open_calls else ""
            call = Call(name, caller, given[0] if len(given) == 1 else given, dict(options))
            calls.append(call)
            open_calls.append(call)

        return hook

    def leave(_: nn.Module, __: Any, returned: Any) -> None:
        open_calls.pop().returned.append(returned)

    handles = []
    for name, child in module.named_modules():
        if name:
            handles += [child.register_forward_pre_hook(enter(name), with_kwargs=True), child.register_forward_hook(leave)]
    try:
        features = module.forward_features(image)  # type: ignore[operator]
        n_feature_calls = len(calls)
        pre_logits = module.forward_head(features, pre_logits=True)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    head_calls = tuple(call.name for call in calls[n_feature_calls:])
    return Trace(tuple(calls[:n_feature_calls]), head_calls, image, features, pre_logits)


def divide_into_stages(module: nn.Module, trace: Trace, second: Trace | None = None) -> Layout:
    """Divide a backbone into stages.

    Args:
        trace: of any image.
        second: of another image, with gradients; compared with `trace`, it shows which keyword arguments of modules are constant
            tensors. Without it, no tensor counts as constant.
    """
    groups = _parameter_groups(module)
    calls = list(_chain_calls(trace, groups))
    names = [call.name for call in calls]
    runs = _runs(module, names, groups)
    chain = tuple(
        ChainModule(call.name, call.options, _shape_of_one(call.given), _shape_of_one(call.returned[0])) for call in calls
    )
    chain_stages = tuple(index for index, run in enumerate(runs) for _ in run)
    stage_of = _stage_of_each_module(module, names, chain_stages)
    tensor_stage = _tensor_stages(module, stage_of, groups, _group_stages(chain, chain_stages, groups))
    module_stages = _module_stages(module, stage_of, tensor_stage)
    stages = tuple(
        _stage(module, index, name, run, stage_of, tensor_stage, chain[chain_stages.index(index) + len(run) - 1].output_shape)
        for index, (name, run) in enumerate(zip(_names(module, runs), runs, strict=True))
    )
    return Layout(stages, chain, chain_stages, _replay_from(trace, calls, _changing(trace, second)), module_stages, tensor_stage)


def _parameter_groups(module: nn.Module) -> dict[str, int]:
    """Return the number of each parameter's coarse group, according to timm."""
    try:
        matcher = module.group_matcher(coarse=True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError):
        return _groups_by_name(module)
    return dict(group_parameters(module, matcher, reverse=True))


def _groups_by_name(module: nn.Module) -> dict[str, int]:
    """Return groups for the few architectures without a group matcher: one for each ``part`` or ``part.number``."""
    keys: dict[str, int] = {}
    groups = {}
    for name, _ in module.named_parameters():
        match = re.match(r"[^.]+(\.\d+)?", name)
        groups[name] = keys.setdefault(match.group() if match else name, len(keys))
    return groups


def _chain_calls(trace: Trace, groups: Mapping[str, int], caller: str = "") -> Iterator[Call]:
    """Yield the outermost calls; instead of a container with several groups (``blocks``, ``features``), the calls inside it."""
    for call in trace.calls:
        if call.caller != caller:
            continue
        is_opened = len(_groups_in(call.name, groups)) > 1 and any(inner.caller == call.name for inner in trace.calls)
        yield from _chain_calls(trace, groups, call.name) if is_opened else (call,)


def _groups_in(name: str, groups: Mapping[str, int]) -> frozenset[int]:
    return frozenset(group for parameter, group in groups.items() if parameter.startswith(f"{name}."))


def _runs(module: nn.Module, names: Sequence[str], groups: Mapping[str, int]) -> list[list[str]]:
    """Return the names of the chain's modules, divided into stages."""
    family = type(module).__name__
    if family in _NAMED_BLOCKS:
        return _runs_by_pattern(names, [pattern for _, pattern in _NAMED_BLOCKS[family]])
    if family in _SPLIT_AT_POOLS:
        return _runs_between_pools(module, names)
    return _merge_lone_norms(module, _runs_by_group(names, groups))


def _runs_by_pattern(names: Sequence[str], patterns: Sequence[str]) -> list[list[str]]:
    return [[name for name in names if re.match(pattern, name)] for pattern in patterns]


def _runs_between_pools(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    runs: list[list[str]] = [[]]
    for name in names:
        runs[-1].append(name)
        if isinstance(module.get_submodule(name), nn.MaxPool2d):
            runs.append([])
    return [run for run in runs if run]


def _runs_by_group(names: Sequence[str], groups: Mapping[str, int]) -> list[list[str]]:
    """Divide the chain by groups.

    A module without parameters belongs to the stage before it. If a group occurs again later, everything from its first
    occurrence on is merged into one stage.
    """
    runs: list[list[str]] = []
    seen: list[frozenset[int]] = []
    for name in names:
        own = _groups_in(name, groups)
        start = next((i for i, others in enumerate(seen) if own & others or not others), None) if own else len(runs) - 1
        if start is None or not runs:
            runs.append([name])
            seen.append(own)
        else:
            runs[start:] = [[member for run in runs[start:] for member in run] + [name]]
            seen[start:] = [frozenset().union(own, *seen[start:])]
    return runs


def _merge_lone_norms(module: nn.Module, runs: list[list[str]]) -> list[list[str]]:
    """Merge stages that contain only norms, such as the final norm of Swin and DenseNet, into the stage before them."""
    merged: list[list[str]] = []
    for run in runs:
        parameters = [parameter for name in run for parameter in module.get_submodule(name).parameters()]
        if merged and all(parameter.ndim <= 1 for parameter in parameters):
            merged[-1] += run
        else:
            merged.append(list(run))
    return merged


def _names(module: nn.Module, runs: Sequence[Sequence[str]]) -> list[str]:
    family = type(module).__name__
    if family in _NAMED_BLOCKS:
        return [name for name, _ in _NAMED_BLOCKS[family]]
    if family in _SPLIT_AT_POOLS:
        return [STEM, *(f"block{number}" for number in range(2, len(runs) + 1))]
    firsts = [run[0] for run in runs[1:]]
    shorts = [_short(first) for first in firsts]
    return [STEM, *(short if shorts.count(short) == 1 else first for short, first in zip(shorts, firsts, strict=True))]


def _short(name: str) -> str:
    """Return the last part of a module's name (``denseblock1``), or the whole name if that part is a number (``blocks.3``)."""
    tail = name.rsplit(".", 1)[-1]
    return name if tail.isdigit() else tail


def shares_tensors(trace: Trace) -> bool:
    """Return whether a module has a tensor among its keyword arguments, such as rotary or relative position embeddings."""
    return any(isinstance(value, Tensor) for call in trace.calls for value in call.options.values())


def _changing(trace: Trace, second: Trace | None) -> frozenset[str]:
    """Return the names of the modules with a keyword argument that depends on the image or on parameters."""
    others = second.calls if second is not None else trace.calls
    return frozenset(
        call.name
        for call, other in zip(trace.calls, others, strict=True)
        for key, value in call.options.items()
        if not (_is_plain(value) or (second is not None and _is_constant(value, other.options[key])))
    )


def _is_constant(value: Any, again: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(again, Tensor) and not again.requires_grad and torch.equal(value, again)


def _replay_from(trace: Trace, chain: Sequence[Call], changing: frozenset[str]) -> int:
    """Return the position in the chain from which on the chain alone computes the features.

    From there on every module is called once, with constant keyword arguments, and its input is the output of the one before.
    """
    position = len(chain)
    expected = trace.features
    later: set[str] = set()
    for call in reversed(chain):
        if call.returned[0] is not expected or call.name in later or call.name in changing:
            break
        if not isinstance(call.given, Tensor):
            break
        position -= 1
        expected = call.given
        later.add(call.name)
    return position


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _shape_of_one(activation: Any) -> tuple[int, ...]:
    return tuple(activation.shape[1:]) if isinstance(activation, Tensor) else ()


def _stage_of_each_module(module: nn.Module, chain: Sequence[str], chain_stages: Sequence[int]) -> dict[str, int]:
    """Return the stage of each module by name, except for containers of the chain's modules.

    A module that is not in the chain belongs to the stage of the module that was registered before it.
    """
    chain_stage = dict(zip(chain, chain_stages, strict=True))
    containers = {""} | {
        ".".join(parts[:depth]) for parts in (name.split(".") for name in chain) for depth in range(1, len(parts))
    }
    stage_of: dict[str, int] = {}
    latest = 0
    for name, _ in module.named_modules():
        on_chain = next((ancestor for ancestor in _ancestors(name) if ancestor in chain_stage), None)
        if on_chain is not None:
            latest = chain_stage[on_chain]
        elif name in containers:
            continue
        stage_of[name] = latest
    return stage_of


def _ancestors(name: str) -> Iterator[str]:
    """Yield the name itself, then the names of the containers around it, from the inside out."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        yield ".".join(parts[:depth])


def _group_stages(chain: Sequence[ChainModule], chain_stages: Sequence[int], groups: Mapping[str, int]) -> dict[int, int]:
    return {group: stage for one, stage in zip(chain, chain_stages, strict=True) for group in _groups_in(one.name, groups)}


def _tensor_stages(
    module: nn.Module, stage_of: Mapping[str, int], groups: Mapping[str, int], group_stages: Mapping[int, int]
) -> dict[str, int]:
    """Return the stage of each parameter and buffer by name.

    Tensors that a container itself owns, such as position embeddings, belong to the stage of their timm group, else to the stem.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: stage_of.get(name.rpartition(".")[0], group_stages.get(groups.get(name, -1), 0)) for name, _ in tensors}


def _module_stages(module: nn.Module, stage_of: Mapping[str, int], tensor_stage: Mapping[str, int]) -> dict[str, frozenset[int]]:
    found = {name: {stage_of[name]} if name in stage_of else set() for name, _ in module.named_modules()}
    for name, stage in [*stage_of.items(), *((tensor.rpartition(".")[0], stage) for tensor, stage in tensor_stage.items())]:
        for ancestor in [*_ancestors(name), ""]:
            if ancestor not in stage_of:
                found[ancestor].add(stage)
    return {name: frozenset(stages) for name, stages in found.items()}


def _stage(
    module: nn.Module,
    index: int,
    name: str,
    run: Sequence[str],
    stage_of: Mapping[str, int],
    tensor_stage: Mapping[str, int],
    output_shape: tuple[int, ...],
) -> Stage:
    """Describe a stage: its modules in the chain and beside it, its tensors and its output."""
    parameters = {key: value for key, value in module.named_parameters() if tensor_stage[key] == index}
    buffers = tuple(key for key, _ in module.named_buffers() if tensor_stage[key] == index)
    on_chain = set(run)
    extra = [
        key
        for key, stage in stage_of.items()
        if stage == index and not any(above in on_chain for above in _ancestors(key)) and key.rpartition(".")[0] not in stage_of
    ]
    count = sum(parameter.numel() for parameter in parameters.values())
    return Stage(index, name, (*run, *extra), tuple(parameters), buffers, count, output_shape)
