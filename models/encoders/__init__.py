"""Encoders: a photo -> feature maps at several strides, whatever library the network comes from.

    encoder = build_encoder("resnet50")                     # torchvision's, by its own name
    encoder = build_encoder("timm:convnext_nano")           # timm's, where timm is installed

An encoder has `channels` (stride -> channels of its map, finest first), `mean` and `std` (of the photos that its
weights were trained on, in units of 1), `load_pretrained()` and `load_file(path)`.
"""

from torch import nn

from models.encoders.timm import TimmEncoder
from models.encoders.torchvision import TorchvisionEncoder


def build_encoder(name: str) -> nn.Module:
    """The encoder of that name with random weights.

    Raises: ValueError for a name that is unknown or does not fit, RuntimeError where timm is missing.
    """
    return TimmEncoder(name.removeprefix("timm:")) if name.startswith("timm:") else TorchvisionEncoder(name)
