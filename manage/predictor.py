"""From a checkpoint to label maps of any photo.

predictor = Predictor.load("best.pt")
result = predictor(Image.open("photo.jpg"))     # .levels .leaves .scores .shares
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.config import DECODE_RULES, Config
from manage import distributed
from manage.checkpoint import load_checkpoint
from manage.inference import photo_logits
from manage.network import restore_network, root_bias
from models.hseg import HSEG
from utils.decode import DECODERS
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import photo_size, read_photo, scaled_size, upright_rgb

TTA_SCALES = (0.75, 1.0, 1.25)
SLIM = 8  # a photo this many times longer than wide is not enlarged: at short_side it could fill the memory


@dataclass
class Result:
    """What the network says of one photo, at the photo's own upright size."""

    photo: Image.Image  # as the network saw it: upright RGB, at the checkpoint's short_side
    leaves: np.ndarray  # (H, W) uint8 node ids
    logits: Tensor  # (N, H, W)
    hierarchy: Hierarchy

    @cached_property
    def levels(self) -> list[np.ndarray]:
        """The label map of each level, leaves first. Shape: L times (H, W) uint8 node ids."""
        return [self.hierarchy.level_of(self.leaves, level) for level in range(self.hierarchy.num_levels)]

    @cached_property
    def scores(self) -> np.ndarray:
        """Score of every node. Shape: (N, H, W) float32 in [0, 1]."""
        return self.logits.sigmoid().cpu().numpy()

    @cached_property
    def shares(self) -> dict[str, float]:
        """Node name -> share of the photo's pixels; a node has those of its leaves, so the roots add up to 1."""
        h = self.hierarchy
        pixels = np.bincount(self.leaves.ravel(), minlength=h.num_nodes)
        totals = np.zeros(h.num_nodes, dtype=np.int64)
        for leaf in h.leaves:
            totals[list(h.paths[leaf])] += pixels[leaf]
        return {name: float(total / self.leaves.size) for name, total in zip(h.names, totals, strict=True)}


class Predictor:
    """A network with its tree and decoding rule, called with a photo.

    `root_bias` of the checkpoint was fitted for the checkpoint's own rule, so another rule goes without it.
    """

    def __init__(self, network: HSEG, config: Config, hierarchy: Hierarchy, decode: str | None = None) -> None:
        self.network, self.config, self.hierarchy = network.eval(), config, hierarchy
        self.rule = decode or config.decode
        if self.rule not in DECODE_RULES:
            raise UserError(f"decode {self.rule!r} is no decoding rule; expected one of {', '.join(DECODE_RULES)}")
        self.root_bias = root_bias(config, hierarchy) if self.rule == config.decode else None
        self.device = next(network.parameters()).device

    @classmethod
    def load(cls, checkpoint: str | Path, device: str = "auto", decode: str | None = None) -> "Predictor":
        """A predictor from a checkpoint, which holds all that it needs.

        Raises: UserError for a checkpoint, device or rule that cannot be used.
        """
        where = distributed.choose_device(device)
        config, hierarchy, network = restore_network(load_checkpoint(checkpoint), str(checkpoint))
        return cls(network.to(where), config, hierarchy, decode)

    def __call__(self, photo: Image.Image, tta: bool = False) -> Result:
        """Predicts a photo of any mode and size; `tta` averages the logits over flips and scales.

        Raises: ValueError for mode F, whose pixels have no known range.
        """
        photo = upright_rgb(photo)
        size = photo.size
        short_side = self._short_side(size)
        if short_side is not None:
            photo = photo.resize(scaled_size(size, short_side), Image.Resampling.BILINEAR)
        return self._predict(photo, size, tta)

    def predict_file(self, path: str | Path, tta: bool = False) -> Result:
        """Predicts a photo file, read exactly as evaluate.py reads it, but that a slim photo is never enlarged.

        Raises: UserError for a file that cannot be read.
        """
        size = photo_size(path)
        return self._predict(read_photo(path, self._short_side(size)), size, tta)

    def predict_as_is(self, photo: Image.Image) -> Result:
        """Predicts an RGB photo at the size that it has, whatever the checkpoint's short_side."""
        return self._predict(photo, photo.size, tta=False)

    def _short_side(self, size: tuple[int, int]) -> int | None:
        short_side = self.config.short_side
        if short_side is not None and max(size) > SLIM * min(size):
            return min(short_side, min(size))
        return short_side

    def _predict(self, photo: Image.Image, size: tuple[int, int], tta: bool) -> Result:
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous().to(self.device)
        logits = self._logits(image, size[::-1], TTA_SCALES if tta else (1.0,), flip=tta)
        leaves = DECODERS[self.rule](logits, self.hierarchy, self.root_bias)[0]
        return Result(photo, leaves.cpu().numpy(), logits[0], self.hierarchy)

    def _logits(self, image: Tensor, size: tuple[int, int], scales: Sequence[float], flip: bool) -> Tensor:
        """The mean over the views. Shape: (3, h, w) uint8 -> (1, N, *size)."""
        amp = self.config.amp if self.device.type == "cuda" else "off"
        total, views = 0, 0
        for scale in scales:
            shape = [max(1, round(side * scale)) for side in image.shape[-2:]]
            view = image if scale == 1 else F.resize(image, shape, antialias=True)
            total = total + photo_logits(self.network, view, size, amp)
            views += 1
            if flip:
                total = total + photo_logits(self.network, view.flip(-1), size, amp).flip(-1)
                views += 1
        return total / views
