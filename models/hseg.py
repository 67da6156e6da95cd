"""The network: encoder, decoder, heads. It knows how many nodes it scores, not what they mean."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoders.unet import UNetDecoder
from models.encoders import build_encoder
from models.heads.segmentation import SegmentationHead


class HSEG(nn.Module):
    """Scores every node of a label tree at every pixel. It takes photos as bytes and normalises them itself.

    Raises: ValueError for an unknown encoder, RuntimeError for weights that cannot be had or do not fit.
    """

    def __init__(
        self,
        encoder: str,
        num_nodes: int,
        pretrained: bool = False,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        subpixel: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.decoder = UNetDecoder(self.encoder.channels, decoder_channels, subpixel)
        self.segmentation_head = SegmentationHead(self.decoder.out_channels, num_nodes)
        self.stride = max(self.encoder.channels)
        # of the photos that the encoder's weights were trained on, in units of 1; kept in checkpoints
        self.register_buffer("input_mean", torch.tensor(self.encoder.mean))
        self.register_buffer("input_std", torch.tensor(self.encoder.std))
        if pretrained:
            self.encoder.load_pretrained()

    def forward(self, photos: Tensor) -> Tensor:
        """Logits of every node.

        Shape: (B, 3, H, W) photos of 0 to 255, bytes or floats, any H and W of at least the stride -> (B, N, H, W).
        """
        height, width = photos.shape[-2:]
        if height < self.stride or width < self.stride:
            raise ValueError(f"image of {height} x {width} is too small; enlarge it to {self.stride} x {self.stride}")
        images = self.normalise(photos)
        rest_h, rest_w = -height % self.stride, -width % self.stride
        if rest_h or rest_w:
            images = F.pad(images, (0, rest_w, 0, rest_h), mode="replicate")
        logits = self.segmentation_head(self.decoder(self.encoder(images)))
        return logits[..., :height, :width]

    def normalise(self, photos: Tensor) -> Tensor:
        """Photos of 0 to 255 as the encoder's weights expect them. Shape: (B, 3, H, W) -> the same, float32."""
        scale = (1 / (255 * self.input_std)).view(3, 1, 1)
        shift = (-self.input_mean / self.input_std).view(3, 1, 1)
        return torch.addcmul(shift, photos.float(), scale)

    def scores(self, photos: Tensor) -> Tensor:
        """Probability of every node: a sigmoid each, since nodes on one path are true together.

        Shape: (B, 3, H, W) of 0 to 255 -> (B, N, H, W) in [0, 1].
        """
        return self(photos).sigmoid()
