"""Encoders: a photo -> feature maps at several strides, whatever library the network comes from.

    encoder = build_encoder("resnet50")                     # torchvision's, by its own name
    encoder = build_encoder("timm:convnext_nano")           # timm's, where timm is installed

An encoder has `channels` (stride -> channels of its map, finest first), `mean` and `std` (of the photos that its
weights were trained on, in units of 1), `load_pretrained()` and `load_file(path)`.
"""

import torch
from torch import Tensor, nn

from models.encoders.timm import TimmEncoder
from models.encoders.torchvision import TorchvisionEncoder


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride; in float32 on a CPU, where its backward pass in bf16 is much slower."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (B, C, H, W) -> (B, C, H / s, W / s)."""
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def build_encoder(name: str) -> nn.Module:
    """The encoder of that name with random weights.

    Raises: ValueError for a name that is unknown or does not fit, RuntimeError where timm is missing.
    """
    encoder = TimmEncoder(name.removeprefix("timm:")) if name.startswith("timm:") else TorchvisionEncoder(name)
    for module in encoder.modules():
        if type(module) is nn.Conv2d and 1 < module.in_channels == module.groups and module.stride != (1, 1):
            module.__class__ = StridedDepthwise  # under its own name, so that weights fit
    return encoder
