"""U-Net decoder: five up-sampling stages, built from any encoder's channels and strides."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (16, 8, 4, 2, 1)  # after each stage


class ConvBlock(nn.Sequential):
    """Convolution at the same resolution, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UpStage(nn.Module):
    """Doubles the resolution, joins the encoder's map of that resolution if there is one, and mixes them."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(in_channels + skip_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = x if skip is None else torch.cat((x, skip), dim=1)  # (B, C + S, 2H, 2W)
        return self.block2(self.block1(x))


class LastStage(nn.Module):
    """The stage to full resolution, where no skip exists: convolves before it up-samples.

    Every pass at full resolution costs four times one at half of it. The up-sampling is bilinear: edges of the
    prediction then lie between pixels anywhere, where sub-pixels written as channels left teeth two pixels apart.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = ConvBlock(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.block(x), scale_factor=2.0, mode="bilinear", align_corners=False)


class SubpixelStage(nn.Sequential):
    """The last stage of checkpoints of version 0.1: a 1 x 1 convolution writes the four sub-pixels as channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        convolution = nn.Conv2d(in_channels, 4 * out_channels, kernel_size=1, bias=False)
        shuffle = nn.PixelShuffle(2)  # (B, 4C, H/2, W/2) -> (B, C, H, W)
        super().__init__()
        self.block = nn.Sequential(convolution, nn.BatchNorm2d(4 * out_channels), shuffle, nn.ReLU(inplace=True))


class UNetDecoder(nn.Module):
    """Source: Ronneberger et al., "U-Net", MICCAI 2015; here with nearest up-sampling and batch normalisation.

    `encoder_channels` is stride -> channels; the deepest stride is 32. A stage without a map of its stride, as after
    ConvNeXt, has no skip.
    """

    def __init__(
        self,
        encoder_channels: Mapping[int, int],
        channels: Sequence[int] = (256, 128, 64, 32, 16),
        subpixel: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != len(STRIDES) or max(encoder_channels) != 2 * STRIDES[0]:
            raise ValueError(
                f"expected 5 stages and an encoder whose deepest map has stride {2 * STRIDES[0]}, found "
                f"{len(channels)} stages and strides {', '.join(map(str, encoder_channels))}"
            )
        self.skips = [list(encoder_channels).index(s) if s in encoder_channels else None for s in STRIDES[:-1]]
        skip_channels = [encoder_channels.get(stride, 0) for stride in STRIDES[:-1]]
        inputs = (encoder_channels[2 * STRIDES[0]], *channels[:3])
        self.stages = nn.ModuleList(map(UpStage, inputs, skip_channels, channels[:4]))
        self.last = (SubpixelStage if subpixel else LastStage)(channels[3], channels[4])
        self.out_channels = channels[4]

    def forward(self, features: list[Tensor]) -> Tensor:
        """Shape: maps, finest first -> (B, out_channels, H, W)."""
        x = features[-1]
        for stage, skip in zip(self.stages, self.skips, strict=True):
            x = stage(x, None if skip is None else features[skip])
        return self.last(x)
