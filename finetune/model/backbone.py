"""Build a backbone from a timm name: the network without its classifier, its stages, and the preprocessing of its weights.

One forward pass is traced to find the stages, and to find which layers of the network lie between the feature map and its
classifier (`Readout`).
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
from finetune.model.stages import Layout, Stage, Trace, divide_into_stages, record_calls, shares_tensors
from finetune.model.weights import Weights, load_weights, resolve_weights, weights_of_origin

# timm's crop modes and our resize modes.
_RESIZE: dict[str, Resize] = {"center": "crop", "squash": "squash", "border": "letterbox"}

# CrossViT and CoaT end in one sequence of tokens for each of their branches; their own heads combine these.
_SEVERAL_MAPS_NOTE = (
    "the network ends in several feature maps, which its own pooling joins, so its logits are not a mean over positions"
)

# VGG's pretrained layers after pooling are deliberately left out.
_VGG_NOTE = (
    "the fully connected fc6 and fc7 are left out: the head uses the global average of the last convolution, "
    "which makes the activation map exact and saves nine tenths of the parameters"
)


@dataclass(frozen=True)
class FeatureFormat:
    """The layout of a network's activations: NCHW, NHWC, or tokens (B, N, D), the first of which may be prefix (class) tokens."""

    channels_last: bool
    n_prefix_tokens: int
    aspect: float  # height / width of the input, hence of the patch grid

    def as_map(self, activation: Tensor) -> Tensor:
        """Return an activation as (B, D, h, w), without prefix tokens."""
        if activation.ndim == 4:
            return activation.permute(0, 3, 1, 2) if self.channels_last else activation
        patches: Tensor = activation[:, self.n_prefix_tokens :].transpose(1, 2)  # (B, D, h*w)
        n_patches = patches.shape[2]
        height = round((n_patches * self.aspect) ** 0.5)
        return patches.reshape(-1, patches.shape[1], height, n_patches // height)


@dataclass(frozen=True)
class Readout:
    """The layers between the feature map and the head.

    Args:
        kind: ``linear``: only pooling. ``layernorm``: pooling and one LayerNorm. ``own``: the network's own pooling and
            pretrained layers, which are kept.
        norm: name of the LayerNorm's module.
        note: for the user, what this means for the class activation map.
    """

    kind: Literal["linear", "layernorm", "own"]
    norm: str = ""
    note: str = ""


class Backbone(nn.Module):
    """A timm network without its classifier. It returns features in timm's layout."""

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
        """Whether the network also takes images of other sizes; False, for example, if it has learnt position embeddings."""
        return not self.weights.pretrained_cfg.get("fixed_input_size", False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of normalised images (B, 3, h, w) float32: NCHW, NHWC or tokens; `as_map` converts them.

        A few networks return a list of such features, which only `own_embedding` takes.
        """
        features: Tensor = self.module.forward_features(images)  # type: ignore[operator]
        return features

    def as_map(self, features: Tensor) -> Tensor:
        return self.feature_format.as_map(features)

    def own_embedding(self, features: Tensor) -> Tensor:
        """Return the embedding (B, num_features) of features, through timm's own pooling and the layers after it."""
        embedding: Tensor = self.module.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return embedding

    def layernorm(self) -> nn.LayerNorm:
        """Return the LayerNorm after pooling of a backbone whose readout is ``layernorm``."""
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
        name: a timm architecture, with or without a tag of weights (``resnet50``, ``resnet50.a1_in1k``), or the place of another
            network in timm's format (``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``).
        weights: see `resolve_weights`.
        input_size_px: side of the square input; ``auto``: the size that the weights were trained with.
        resize: mode for images that are not square; ``auto``: the mode that the weights were evaluated with.
        cache: folder for downloaded weights.
        origin: a model of the user, whose backbone and weights are used instead; ``auto`` then is its input size.

    Raises:
        UnknownBackbone, WeightsError: see `resolve_weights`.
        InvalidInput: the network cannot take images of this size.
    """
    # By default cuDNN convolves in TF32, with 10 bits of mantissa: on an H100 the probabilities in training then differed from
    # those of the exported model by up to 0.007. If lower precision is faster, training uses bfloat16.
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
        trace = _trace_noise(name, module, found, preprocess.input_size_px, seed=0)
    feature_format = _feature_format(module, trace)
    readout = _readout(module, trace, feature_format)
    _drop_unused(module, trace, readout)
    load_weights(module, found)
    second = _trace_noise(name, module, found, preprocess.input_size_px, seed=1) if shares_tensors(trace) else None
    layout = divide_into_stages(module, trace, second)
    n_features = (trace.pre_logits if readout.kind == "own" else feature_format.as_map(trace.features)).shape[1]
    # LeViT and others cache tensors that they compute in eval mode; switching to train mode clears these caches.
    module.train().eval()
    loaded = dataclasses.replace(found, state_dict=None)
    return Backbone(name, module, layout, loaded, preprocess, feature_format, readout, n_features)


def _own_size(origin: Origin) -> int | Literal["auto"]:
    height, width = origin.manifest.preprocess.input_size_px
    return height if height == width else "auto"


def _create(name: str, weights: Weights, input_size_px: int | Literal["auto"]) -> nn.Module:
    """Create timm's network without its classifier and without weights.

    Raises:
        UnknownBackbone: the network does not separate features and head.
        InvalidInput: it cannot take images of this size.
    """
    options: dict[str, Any] = dict(weights.pretrained_cfg.get("model_args", {}))
    architecture = weights.pretrained_cfg["architecture"] if "model_args" in weights.pretrained_cfg else name
    if timm.model_entrypoint(weights.pretrained_cfg["architecture"]).__module__ == vgg.__name__:
        options["mlp_ratio"] = 1 / 4096  # makes fc6 and fc7, which are not used, one unit wide: builds in 0.1 s instead of 3 s
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
    """Return the preprocessing from timm's record of the weights, with the requested input size and resize mode."""
    config = resolve_model_data_config(module, pretrained_cfg=weights.pretrained_cfg)
    _, height, width = config["input_size"]
    own = _RESIZE[config["crop_mode"]]
    red, green, blue = (float(value) for value in config["mean"])
    red_std, green_std, blue_std = (float(value) for value in config["std"])
    return Preprocess(
        input_size_px=(height, width) if input_size_px == "auto" else (input_size_px, input_size_px),
        resize=own if resize == "auto" else resize,
        # squash and letterbox are requested to keep the whole image, so nothing is cropped
        crop_fraction=float(config["crop_pct"]) if resize in ("auto", "crop", own) else 1.0,
        interpolation=config["interpolation"],
        fill=(round(255 * red), round(255 * green), round(255 * blue)),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )


def _trace_noise(name: str, module: nn.Module, weights: Weights, input_size_px: tuple[int, int], seed: int) -> Trace:
    """Trace a forward pass of a noise image.

    Raises:
        InvalidInput: the network cannot take images of this size.
        UnknownBackbone: it does not end in feature maps.
    """
    image = 2 * torch.rand(1, 3, *input_size_px, generator=torch.Generator().manual_seed(seed)) - 1
    try:
        trace = record_calls(module.eval(), image)
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
    """Return the number that timm declares; if it declares none, the number of tokens beyond the largest square grid."""
    declared: Any = getattr(module, "num_prefix_tokens", None)
    if declared is not None:
        return int(declared)
    n_tokens = features.shape[1]
    return n_tokens - math.isqrt(n_tokens) ** 2


def _readout(module: nn.Module, trace: Trace, feature_format: FeatureFormat) -> Readout:
    """Find the kind of readout, by comparing the input of the network's own classifier with the mean over positions."""
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
            "linear", note="" if is_mean else "the head uses the mean over positions, not on the network's own pooling"
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
    """Remove the layers after pooling that our head does not use, so that they are neither trained, hashed nor counted."""
    if readout.kind == "own":
        return
    used = {call.name.split(".")[0] for call in trace.calls} | {readout.norm.split(".")[0]}
    for name in {name.split(".")[0] for name in trace.head_calls} - used:
        if any(True for _ in module.get_submodule(name).parameters()):
            setattr(module, name, nn.Identity())
