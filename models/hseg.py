"""The network: encoder, decoder, heads. It knows how many nodes it scores, not what they mean."""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from models.decoders.unet import UNetDecoder
from models.encoders.resnet import ResNetEncoder
from models.heads.classification import ClassificationHead
from models.heads.segmentation import SegmentationHead


class HSEG(nn.Module):
    """Scores every node of a label tree at every pixel.

    Raises: ValueError for an unknown encoder, RuntimeError for weights that cannot be had or do not fit.
    """

    def __init__(
        self,
        encoder: str,
        num_nodes: int,
        pretrained: bool = False,
        encoder_weights: str | Path | None = None,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(encoder)
        self.decoder = UNetDecoder(self.encoder.channels, decoder_channels)
        self.segmentation_head = SegmentationHead(self.decoder.out_channels, num_nodes)
        self.classification_head = ClassificationHead()
        self.stride = self.encoder.strides[-1]
        if pretrained:
            self.encoder.load_imagenet(encoder)
        if encoder_weights is not None:
            self.encoder.load_file(encoder_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every node.

        Shape: (B, 3, H, W) normalised photos, any H and W of at least the stride -> (B, N, H, W).
        """
        height, width = images.shape[-2:]
        if height < self.stride or width < self.stride:
            raise ValueError(f"image of {height} x {width} is too small; enlarge it to {self.stride} x {self.stride}")
        rest_h, rest_w = -height % self.stride, -width % self.stride
        if rest_h or rest_w:
            images = F.pad(images, (0, rest_w, 0, rest_h), mode="replicate")
        logits = self.segmentation_head(self.decoder(self.encoder(images)))
        return logits[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Probability of every node. Shape: (B, 3, H, W) -> (B, N, H, W) in [0, 1]."""
        return self.classification_head(self(images))
