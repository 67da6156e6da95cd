"""U-Net decoder: five up-sampling stages, built from any encoder's channel counts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.memory import recomputed


class ConvBlock(nn.Sequential):
    """Convolution at the same resolution, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def join(x: Tensor, skip: Tensor) -> Tensor:
    """Shape: (B, C, H, W) and (B, S, 2H, 2W) -> (B, C + S, 2H, 2W)."""
    return torch.cat((F.interpolate(x, scale_factor=2.0, mode="nearest"), skip), dim=1)


class UpStage(nn.Module):
    """Doubles the resolution, joins the encoder's map of that resolution, and mixes them in two convolutions.

    The joined map is the largest of a stage, and a copy of two that are kept anyway: it is not kept for the backward
    pass, but joined again.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(in_channels + skip_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        joined = join(x, skip)
        with recomputed(joined, join, x, skip):
            mixed = self.block1(joined)
        return self.block2(mixed)


class LastStage(nn.Module):
    """The stage to full resolution, where no skip exists: convolves before it up-samples.

    Every pass at full resolution costs four times one at half of it, so a 1 x 1 convolution runs at half resolution
    and writes the four sub-pixels of each position as channels. The head after it mixes neighbours. ReLU comes after
    the shuffle, so that autograd keeps one map at full resolution for both ReLU and head, not one for each.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(in_channels, 4 * out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(4 * out_channels),
            nn.PixelShuffle(2),  # (B, 4C, H/2, W/2) -> (B, C, H, W)
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class UNetDecoder(nn.Module):
    """Source: Ronneberger et al., "U-Net", MICCAI 2015; here with nearest up-sampling and batch normalisation."""

    def __init__(self, encoder_channels: Sequence[int], channels: Sequence[int] = (256, 128, 64, 32, 16)) -> None:
        super().__init__()
        if len(encoder_channels) != 5 or len(channels) != 5:
            raise ValueError(f"expected 5 encoder maps and 5 stages, found {len(encoder_channels)} and {len(channels)}")
        *skips, deepest = encoder_channels
        inputs = (deepest, *channels[:3])
        self.stages = nn.ModuleList(map(UpStage, inputs, reversed(skips), channels[:4]))
        self.last = LastStage(channels[3], channels[4])
        self.out_channels = channels[4]

    def forward(self, features: list[Tensor]) -> Tensor:
        """Shape: five maps, finest first -> (B, out_channels, H, W)."""
        *skips, x = features
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        return self.last(x)
