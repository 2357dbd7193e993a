"""A pretrained network without its classifier: any timm name becomes a module, its stages and the preprocessing of its weights.

Decides, by looking at one forward pass, what stands between the feature map and a linear head (`Readout`). Knows nothing of
classes, heads or training.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import vgg
from torch import Tensor, nn
from torch.nn import functional

from finetune.bundle.preprocess import Preprocess, Resize
from finetune.bundle.weights import Origin
from finetune.errors import InvalidInput, UnknownBackbone
from finetune.model.stages import Layout, Stage, Trace, lay_out, shares_tensors, watch
from finetune.model.weights import Weights, load_weights, resolve_weights, weights_of_origin

# timm's word for how an image of another shape is framed, and ours.
_RESIZE: dict[str, Resize] = {"center": "crop", "squash": "squash", "border": "letterbox"}

# CrossViT and CoaT end in a sequence of tokens for each of their branches, which their own heads join.
_SEVERAL_MAPS_NOTE = (
    "the network ends in several feature maps, which its own pooling joins, so its logits are not a mean over positions"
)

# VGG's pretrained layers after pooling are left out on purpose.
_VGG_NOTE = (
    "the fully connected fc6 and fc7 are left out: the head stands on the global average of the last convolution, "
    "which makes the activation map exact and saves nine tenths of the parameters"
)


@dataclass(frozen=True)
class FeatureFormat:
    """How a network lays out its activations: NCHW, NHWC, or tokens with some that stand for no patch in front."""

    channels_last: bool
    n_prefix_tokens: int
    aspect: float  # height / width of the input, hence of the patch grid

    def as_map(self, activation: Tensor) -> Tensor:
        """Any activation as (B, D, h, w)."""
        if activation.ndim == 4:
            return activation.permute(0, 3, 1, 2) if self.channels_last else activation
        patches: Tensor = activation[:, self.n_prefix_tokens :].transpose(1, 2)  # (B, D, h*w)
        n_patches = patches.shape[2]
        height = round((n_patches * self.aspect) ** 0.5)
        return patches.reshape(-1, patches.shape[1], height, n_patches // height)


@dataclass(frozen=True)
class Readout:
    """What stands between the feature map and a head.

    ``linear``: nothing but pooling. ``layernorm``: one LayerNorm (the module named `norm`) of the pooled vector. ``own``:
    pretrained layers after pooling, which are kept. `note` is for the person who wonders about the class activation map.
    """

    kind: Literal["linear", "layernorm", "own"]
    norm: str = ""
    note: str = ""


class Backbone(nn.Module):
    """A timm network without classifier. Calling it gives the features in timm's own layout."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layout: Layout,
        weights: Weights,
        preprocess: Preprocess,
        feature_format: FeatureFormat,
        readout: Readout,
        num_features: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.module = module
        self.layout = layout
        self.weights = weights
        self.preprocess = preprocess
        self.feature_format = feature_format
        self.readout = readout
        self.num_features = num_features

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.layout.stages

    @property
    def n_parameters(self) -> int:
        return sum(stage.n_parameters for stage in self.stages)

    @property
    def resizable(self) -> bool:
        """Whether the network as it is takes images of other sizes too: not if it has learnt positions."""
        return not self.weights.pretrained_cfg.get("fixed_input_size", False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) float32, normalised, to the features: NCHW, NHWC or tokens. `as_map` makes them (B, D, h, w).

        A few networks give a list of such features, which only `own_embedding` takes.
        """
        features: Tensor = self.module.forward_features(images)  # type: ignore[operator]
        return features

    def as_map(self, features: Tensor) -> Tensor:
        return self.feature_format.as_map(features)

    def own_embedding(self, features: Tensor) -> Tensor:
        """The features through timm's own pooling and what it has after it, to (B, num_features)."""
        embedding: Tensor = self.module.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return embedding

    def layernorm(self) -> nn.LayerNorm:
        """The LayerNorm after pooling, of a backbone whose readout is ``layernorm``."""
        norm = self.module.get_submodule(self.readout.norm)
        assert isinstance(norm, nn.LayerNorm)
        return norm


def build_backbone(
    name: str,
    *,
    weights: str = "auto",
    input_size_px: int | Literal["auto"] = "auto",
    resize: Resize | Literal["auto"] = "auto",
    cache: Path | None = None,
    origin: Origin | None = None,
) -> Backbone:
    """Build a backbone with its weights, in eval mode.

    Args:
        name: any timm architecture, with or without a weights tag (``resnet50``, ``resnet50.a1_in1k``), or where timm finds
            another (``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``).
        weights: see `resolve_weights`.
        input_size_px: side of the square input; ``auto`` is what the weights were trained at.
        resize: how images of another shape are framed; ``auto`` is how the weights were evaluated.
        cache: where downloaded weights are kept.
        origin: one's own model, whose backbone and weights are taken instead; ``auto`` is the input size that it has.

    Raises:
        UnknownBackbone, WeightsError: see `resolve_weights`.
        InvalidInput: the network cannot take images of that size.
    """
    # By default a GPU rounds what it convolves to 10 bits: on an H100 the answers in training then differed from those of the
    # exported model by up to 0.007 of probability. Speed comes from bfloat16, where training chooses it.
    torch.backends.cudnn.allow_tf32 = False
    if origin is None:
        found = resolve_weights(name, weights, cache)
    else:
        name, found = origin.architecture, weights_of_origin(origin, cache)
        if input_size_px == "auto":
            input_size_px = _own_size(origin)
    module = _create(name, found, input_size_px)
    preprocess = _preprocess(module, found, input_size_px, resize)
    with torch.no_grad():
        trace = _watch_noise(name, module, found, preprocess.input_size_px, seed=0)
    feature_format = _feature_format(module, trace)
    readout = _readout(module, trace, feature_format)
    _drop_unused(module, trace, readout)
    load_weights(module, found)
    second = _watch_noise(name, module, found, preprocess.input_size_px, seed=1) if shares_tensors(trace) else None
    layout = lay_out(module, trace, second)
    n_features = (trace.pre_logits if readout.kind == "own" else feature_format.as_map(trace.features)).shape[1]
    # LeViT and others keep what they computed in eval mode; entering train mode drops it.
    module.train().eval()
    loaded = dataclasses.replace(found, state_dict=None)
    return Backbone(name, module, layout, loaded, preprocess, feature_format, readout, n_features)


def _own_size(origin: Origin) -> int | Literal["auto"]:
    height, width = origin.manifest.preprocess.input_size_px
    return height if height == width else "auto"


def _create(name: str, weights: Weights, input_size_px: int | Literal["auto"]) -> nn.Module:
    options: dict[str, Any] = dict(weights.pretrained_cfg.get("model_args", {}))
    architecture = weights.pretrained_cfg["architecture"] if "model_args" in weights.pretrained_cfg else name
    if timm.model_entrypoint(weights.pretrained_cfg["architecture"]).__module__ == vgg.__name__:
        options["mlp_ratio"] = 1 / 4096  # fc6 and fc7, which are left out, one unit wide: 0.1 s to build instead of 3 s
    if input_size_px != "auto" and weights.pretrained_cfg.get("fixed_input_size"):
        options["img_size"] = input_size_px
    try:
        module: nn.Module = timm.create_model(architecture, pretrained=False, **{**options, "num_classes": 0})
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise _wrong_size(name, weights, input_size_px, "its layers are made for one size") from None
    except (AssertionError, ValueError) as error:
        if "img_size" not in options:
            raise
        raise _wrong_size(name, weights, input_size_px, str(error)) from None
    if not hasattr(module, "forward_features") or not hasattr(module, "forward_head"):
        raise UnknownBackbone(
            f"model.backbone: {name} is not an image classifier with features and a head; take another architecture."
        )
    return module


def _preprocess(
    module: nn.Module, weights: Weights, input_size_px: int | Literal["auto"], resize: Resize | Literal["auto"]
) -> Preprocess:
    config = resolve_model_data_config(module, pretrained_cfg=weights.pretrained_cfg)
    _, height, width = config["input_size"]
    own = _RESIZE[config["crop_mode"]]
    red, green, blue = (float(value) for value in config["mean"])
    red_std, green_std, blue_std = (float(value) for value in config["std"])
    return Preprocess(
        input_size_px=(height, width) if input_size_px == "auto" else (input_size_px, input_size_px),
        resize=own if resize == "auto" else resize,
        # who asks for squash or letterbox wants to lose nothing
        crop_fraction=float(config["crop_pct"]) if resize in ("auto", "crop", own) else 1.0,
        interpolation=config["interpolation"],
        fill=(round(255 * red), round(255 * green), round(255 * blue)),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )


def _watch_noise(name: str, module: nn.Module, weights: Weights, input_size_px: tuple[int, int], seed: int) -> Trace:
    image = 2 * torch.rand(1, 3, *input_size_px, generator=torch.Generator().manual_seed(seed)) - 1
    try:
        trace = watch(module.eval(), image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _wrong_size(name, weights, input_size_px[0], str(error)) from None
    if not _is_feature_map(trace.features) and not _are_feature_maps(trace.features):
        raise UnknownBackbone(
            f"model.backbone: {name} does not end in a feature map, which a head needs; take another architecture."
        )
    return trace


def _is_feature_map(features: Any) -> TypeGuard[Tensor]:
    return isinstance(features, Tensor) and features.ndim in (3, 4)


def _are_feature_maps(features: Any) -> bool:
    return isinstance(features, list | tuple) and len(features) > 0 and all(map(_is_feature_map, features))


def _wrong_size(name: str, weights: Weights, given: int | str, why: str) -> InvalidInput:
    native = weights.pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    reason = (why.strip().splitlines() or ["it fails"])[0].rstrip(".")
    return InvalidInput(
        f"model.input_size_px: {name} cannot take images of {given} px ({reason}). "
        f"Its weights were trained at {native} px: leave it at auto, or try another multiple of 32."
    )


def _feature_format(module: nn.Module, trace: Trace) -> FeatureFormat:
    height, width = trace.image.shape[2:]
    return FeatureFormat(
        channels_last=str(getattr(module, "output_fmt", "NCHW")) == "NHWC",
        n_prefix_tokens=_n_prefix_tokens(module, trace.features) if _is_tokens(trace.features) else 0,
        aspect=height / width,
    )


def _is_tokens(features: Any) -> TypeGuard[Tensor]:
    return isinstance(features, Tensor) and features.ndim == 3


def _n_prefix_tokens(module: nn.Module, features: Tensor) -> int:
    """As timm says; where it does not, what is left over from a square grid."""
    declared: Any = getattr(module, "num_prefix_tokens", None)
    if declared is not None:
        return int(declared)
    n_tokens = features.shape[1]
    return n_tokens - math.isqrt(n_tokens) ** 2


def _readout(module: nn.Module, trace: Trace, feature_format: FeatureFormat) -> Readout:
    """Compare what the original classifier gets with the plain mean over positions."""
    if not _is_feature_map(trace.features):
        return Readout("own", note=_SEVERAL_MAPS_NOTE)
    if isinstance(module, vgg.VGG):
        return Readout("linear", note=_VGG_NOTE)
    mean = feature_format.as_map(trace.features).mean((2, 3))
    layers = [
        name
        for name in dict.fromkeys(trace.head_calls)
        if any(True for _ in module.get_submodule(name).parameters(recurse=False))
    ]
    if not layers:
        is_mean = mean.shape == trace.pre_logits.shape and torch.allclose(mean, trace.pre_logits, rtol=1e-3, atol=1e-4)
        return Readout(
            "linear", note="" if is_mean else "the head stands on the mean over positions, not on the network's own pooling"
        )
    norm = module.get_submodule(layers[0])
    if len(layers) == 1 and isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) == tuple(mean.shape[1:]):
        normed = functional.layer_norm(mean, mean.shape[1:], norm.weight, norm.bias, norm.eps)
        if torch.allclose(normed, trace.pre_logits, rtol=1e-3, atol=1e-4):
            return Readout("layernorm", norm=layers[0])
    note = (
        f"after pooling the network applies pretrained layers ({', '.join(layers)}), so its logits are not a mean over positions"
    )
    return Readout("own", note=note)


def _drop_unused(module: nn.Module, trace: Trace, readout: Readout) -> None:
    """Remove the layers after pooling that our head does without, so that they are neither trained, hashed nor counted."""
    if readout.kind == "own":
        return
    used = {call.name.split(".")[0] for call in trace.calls} | {readout.norm.split(".")[0]}
    for name in {name.split(".")[0] for name in trace.head_calls} - used:
        if any(True for _ in module.get_submodule(name).parameters()):
            setattr(module, name, nn.Identity())
