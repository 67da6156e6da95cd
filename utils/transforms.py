"""Photo and label map -> tensors: a random view for training, the whole photo for evaluation. No tree logic."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # what padding shows


def normalise(images: Tensor) -> Tensor:
    """Bytes -> floats with the mean and deviation that ImageNet weights expect; on whatever device they are.

    Shape: (B, 3, H, W) uint8 -> (B, 3, H, W) float32.
    """
    scale = torch.tensor([1 / (255 * std) for std in IMAGENET_STD], device=images.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], device=images.device)
    return torch.addcmul(shift.view(3, 1, 1), images.float(), scale)


def to_tensors(photo: Image.Image, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Shape: (W, H) photo and (H', W') map -> (3, H, W) and (H', W') uint8."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).contiguous(), torch.from_numpy(np.array(labels))


@dataclass
class RandomView:
    """A random square view: scale, crop, flip and colour, resizing no pixel that is not kept.

    The window is chosen in the photo's own pixels and resized to the wanted size at once. Where it reaches over the
    photo's edge the view shows the mean colour, labelled `void`. Random numbers come from torch's generator.
    """

    size: int
    short_side: int | None
    scale_jitter: list[float] | None
    hflip: float
    color_jitter: float
    void: int

    def __post_init__(self) -> None:
        strength = self.color_jitter
        self.jitter_colour = v2.ColorJitter(strength, strength, strength) if strength else None

    def __call__(self, photo: Image.Image, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Shape: (W, H) photo, (H, W) map -> (3, size, size), (size, size) uint8."""
        scale = (self.short_side or min(photo.size)) / min(photo.size)
        if self.scale_jitter is not None:
            scale *= _uniform(*self.scale_jitter)
        x, y = self._place(photo.width, scale), self._place(photo.height, scale)
        # uint8 with interleaved channels: torch resizes that several times as fast as PIL
        window = torch.from_numpy(np.array(photo.crop((x.start, y.start, x.stop, y.stop)))).permute(2, 0, 1)
        view = F.interpolate(window[None], (y.length, x.length), mode="bilinear", antialias=True)[0]
        crop = Image.fromarray(labels[y.start : y.stop, x.start : x.stop])
        seen = torch.from_numpy(np.array(crop.resize((x.length, y.length), Image.Resampling.NEAREST)))
        if seen.shape != (self.size, self.size):
            view, seen = self._on_canvas(view, seen, x.offset, y.offset)
        if torch.rand(()) < self.hflip:
            view, seen = view.flip(-1), seen.flip(-1)
        if self.jitter_colour is not None:
            view = self.jitter_colour(view)
        return view, seen

    def _place(self, length: int, scale: float) -> "Place":
        """One axis of the window: what of the photo is seen, and where it lies in the view."""
        window = max(1, round(self.size / scale))
        if window <= length:
            start = int(_uniform(0, length - window + 1))
            return Place(start, start + window, self.size, 0)
        seen = max(1, min(self.size, round(length * scale)))
        return Place(0, length, seen, int(_uniform(0, self.size - seen + 1)))

    def _on_canvas(self, view: Tensor, seen: Tensor, x: int, y: int) -> tuple[Tensor, Tensor]:
        height, width = seen.shape
        image = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1).repeat(1, self.size, self.size)
        labels = torch.full((self.size, self.size), self.void, dtype=torch.uint8)
        image[:, y : y + height, x : x + width] = view
        labels[y : y + height, x : x + width] = seen
        return image, labels


class Place(NamedTuple):
    """The pixels [start, stop) of the photo, drawn `length` pixels long at `offset`."""

    start: int
    stop: int
    length: int
    offset: int


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()
