"""A whole photo through the network, at its own size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.transforms import normalise


@torch.inference_mode()
def photo_logits(network: nn.Module, image: Tensor, size: tuple[int, int], amp: str = "off") -> Tensor:
    """Logits of one photo at `size`, whatever size it was fed at; padding is cut off before anything is scored.

    Shape: (3, h, w) uint8 -> (1, N, *size) float32.
    """
    images = image.unsqueeze(0)
    height, width = images.shape[-2:]
    least = getattr(network, "stride", 32)
    if min(height, width) < least:  # slimmer than the encoder's stride
        padding = (0, max(0, least - width), 0, max(0, least - height))
        images = F.pad(images.float(), padding, mode="replicate").to(torch.uint8)
    with autocast(image.device, amp):
        logits = network(normalise(images))
    logits = logits.float()[..., :height, :width]
    if (height, width) != size:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits.contiguous()  # one plane a node, which decoding reads faster


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision for the network alone; the loss stays outside."""
    kind = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=amp != "off")
