"""Small networks for `finetune study depth`, which differ only in depth, shortcuts, initialisation and batch normalisation.

They follow He et al. 2015 (arXiv:1512.03385, section 4.2): a stem, three groups of blocks with 16, 32 and 64 channels, pooling
and the head; each block has two 3x3 convolutions. A *plain* network is such a stack without shortcuts, like VGG (Simonyan &
Zisserman 2014, arXiv:1409.1556). A *residual* network of the same depth has exactly as many parameters, and an identity shortcut
beside each block (where the size changes, it takes every second pixel and fills the new channels with zeros). The last layer of
each residual block is initialised with zeros, so that the block begins as the identity (Goyal et al. 2017, arXiv:1706.02677;
without batch normalisation this keeps activations from growing from block to block, Zhang et al. 2019, arXiv:1901.09321).

The number in a name counts the layers with weights, the head included. The suffix names the aid: none, PyTorch's default
initialisation; ``_he``, the initialisation of He et al. 2015 (arXiv:1502.01852); ``_bn``, batch normalisation (Ioffe & Szegedy
2015, arXiv:1502.03167) and that initialisation.

The networks are registered with timm, so they can be used like any backbone; every block is a stage of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

Aid = Literal["", "he", "bn"]

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 74, 110)  # 6 n + 2: n blocks in each of three groups
KINDS = ("plain", "residual")
AIDS: tuple[Aid, ...] = ("", "he", "bn")
WIDTHS = (16, 32, 64)
INPUT_SIZE_PX = 32


def network_name(kind: str, depth: int, aid: Aid) -> str:
    """Return the name under which a network is registered with timm: ``plain20``, ``residual20_bn``."""
    return f"{kind}{depth}_{aid}" if aid else f"{kind}{depth}"


class Block(nn.Module):
    """Two 3x3 convolutions; with `shortcut`, the block's input is added before the last activation."""

    def __init__(self, n_in: int, n_out: int, stride: int, aid: Aid, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = _convolution(n_in, n_out, stride, aid)
        self.conv2, self.norm2, self.act2 = _convolution(n_out, n_out, 1, aid)
        self.stride, self.new_channels, self.shortcut = stride, n_out - n_in, shortcut
        if shortcut:
            last = self.norm2 if aid == "bn" else self.conv2
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, activation: Tensor) -> Tensor:
        within = self.act1(self.norm1(self.conv1(activation)))
        within = self.norm2(self.conv2(within))
        if self.shortcut:
            within = within + self._identity(activation)
        result: Tensor = self.act2(within)
        return result

    def _identity(self, activation: Tensor) -> Tensor:
        if self.stride > 1:
            activation = activation[:, :, :: self.stride, :: self.stride]
        return functional.pad(activation, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else activation


class DepthNetwork(nn.Module):
    """A plain or residual network with timm's interface."""

    def __init__(self, depth: int, aid: Aid, shortcut: bool, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"a depth is 6 n + 2, given {depth}")
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, WIDTHS[-1], WIDTHS[-1]
        # the first layer halves the resolution, for a quarter of the computation; digits remain legible
        self.stem = nn.Sequential(*_convolution(in_chans, WIDTHS[0], 2, aid))
        blocks, n_in = [], WIDTHS[0]
        for width in WIDTHS:
            for number in range((depth - 2) // 6):
                blocks.append(Block(n_in, width, 2 if number == 0 and width != WIDTHS[0] else 1, aid, shortcut))
                n_in = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(WIDTHS[-1], num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(images))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def _convolution(n_in: int, n_out: int, stride: int, aid: Aid) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return a 3x3 convolution, its normalisation (the identity without ``bn``), and its activation."""
    convolution = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=aid != "bn")
    if aid:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return convolution, nn.BatchNorm2d(n_out) if aid == "bn" else nn.Identity(), nn.ReLU()


def _entrypoint(kind: str, depth: int, aid: Aid) -> Callable[..., nn.Module]:
    """Return the function that timm calls to build a network."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        network = DepthNetwork(depth, aid, shortcut=kind == "residual", **options)
        network.pretrained_cfg = pretrained_cfg
        return network

    build.__name__ = network_name(kind, depth, aid)
    return build


_NETWORKS = [(kind, depth, aid) for kind in KINDS for depth in DEPTHS for aid in AIDS]

default_cfgs = generate_default_cfgs(
    {
        network_name(*network): {
            "input_size": (3, INPUT_SIZE_PX, INPUT_SIZE_PX),
            "num_classes": 10,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.0",
            "classifier": "fc",
        }
        for network in _NETWORKS
    }
)

for _network in _NETWORKS:
    register_model(_entrypoint(*_network))
