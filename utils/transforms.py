"""What ImageNet weights expect of a photo."""

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images: Tensor) -> Tensor:
    """Bytes -> floats with the mean and deviation that ImageNet weights expect; on whatever device they are.

    Shape: (B, 3, H, W) uint8 -> (B, 3, H, W) float32.
    """
    scale = torch.tensor([1 / (255 * std) for std in IMAGENET_STD], device=images.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], device=images.device)
    return torch.addcmul(shift.view(3, 1, 1), images.float(), scale)
