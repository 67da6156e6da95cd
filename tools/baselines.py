"""What `tools/benchmark.py` measures against: the same results, written plainly from the definitions.

    from tools.baselines import bce

Each function is what one writes first: whole tensors, one step of the definition at a time, one look-up a class.
They are for leaf labels and void, as in the data set, and the tests hold them equal to the fast code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.encoders import build_encoder
from utils.hierarchy import Hierarchy

EPSILON = 1e-8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def below(node: int, h: Hierarchy) -> list[int]:
    """The node and its descendants."""
    return [v for v, path in enumerate(h.paths) if node in path]


# --- data ---
def encode_mask(labels: np.ndarray, h: Hierarchy) -> np.ndarray:
    """One boolean a node. Shape: (H, W) -> (H, W, N)."""
    planes = np.zeros((*labels.shape, h.num_nodes), dtype=bool)
    for node in range(h.num_nodes):
        for member in below(node, h):
            planes[..., node] |= labels == member
    return planes


def encode_folder(masks: list[Path], out: Path, h: Hierarchy) -> None:
    """Writes `<id>.npy`, one boolean a node and pixel, for every mask."""
    out.mkdir(parents=True, exist_ok=True)
    for path in masks:
        with Image.open(path) as image:
            np.save(out / f"{path.stem}.npy", encode_mask(np.array(image), h))


def load_view(photo: Path, planes: Path, size: int, scale_jitter: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """A random view: photo and planes in one float tensor, resized and flipped whole, cropped last.

    Shape: -> (3, size, size) and (N, size, size) float32.
    """
    with Image.open(photo) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    targets = torch.from_numpy(np.load(planes)).permute(2, 0, 1).float()
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    both = torch.cat([(pixels - mean) / std, targets]).unsqueeze(0)  # (1, 3 + N, H, W)
    scale = scale_jitter[0] + (scale_jitter[1] - scale_jitter[0]) * torch.rand(()).item()
    both = F.interpolate(both, scale_factor=scale, mode="bilinear", align_corners=False)
    if torch.rand(()).item() < 0.5:
        both = both.flip(3)
    height, width = both.shape[2:]
    both = F.pad(both, (0, max(0, size - width), 0, max(0, size - height)))
    top = int(torch.randint(0, both.shape[2] - size + 1, ()))
    left = int(torch.randint(0, both.shape[3] - size + 1, ()))
    view = both[0, :, top : top + size, left : left + size]
    return view[:3].clone(), (view[3:] > 0.5).float()


# --- losses ---
def multi_hot(labels: Tensor, h: Hierarchy) -> tuple[Tensor, Tensor]:
    """Shape: (B, H, W) -> targets (B, N, H, W) float32, labelled (B, 1, H, W) bool."""
    one_hot = F.one_hot(torch.where(labels == h.ignore_index, 0, labels).long(), h.num_nodes).permute(0, 3, 1, 2)
    targets = torch.stack([one_hot[:, below(node, h)].sum(1) for node in range(h.num_nodes)], dim=1).float()
    return targets, (labels != h.ignore_index).unsqueeze(1)


def bce(logits: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    targets, labelled = multi_hot(labels, h)
    losses = F.binary_cross_entropy(logits.sigmoid(), targets, reduction="none")
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


def tree_min(logits: Tensor, labels: Tensor, h: Hierarchy) -> Tensor:
    targets, labelled = multi_hot(labels, h)
    scores = logits.sigmoid()
    losses = []
    for node in range(h.num_nodes):
        lowest = scores[:, list(h.paths[node])].min(dim=1).values
        highest = scores[:, below(node, h)].max(dim=1).values
        target = targets[:, node]
        losses.append(-target * torch.log(lowest + EPSILON) - (1 - target) * torch.log(1 - highest + EPSILON))
    return (torch.stack(losses, dim=1) * labelled).sum() / labelled.sum().clamp(min=1)


# --- scores ---
def decode(logits: Tensor, h: Hierarchy) -> Tensor:
    """`prob_sum`: the leaf with the largest sum of scores on its path. Shape: (B, N, H, W) -> (B, H, W)."""
    scores = logits.sigmoid()
    sums = torch.stack([scores[:, list(h.paths[leaf])].sum(dim=1) for leaf in h.leaves], dim=1)
    return torch.tensor(h.leaves, device=logits.device)[sums.argmax(dim=1)]


class Scores:
    """Intersection and union of every level and class, by logical and and or; and violated edges."""

    def __init__(self, h: Hierarchy) -> None:
        self.h = h
        self.counts = {(level, v): [0, 0] for level, classes in enumerate(h.level_classes) for v in classes}
        self.violations = 0

    def update(self, leaf: Tensor, labels: Tensor, logits: Tensor) -> None:
        labelled = labels != self.h.ignore_index
        for (level, node), counts in self.counts.items():
            members = [v for v in self.h.leaves if self.h.level_tables[level][v] == node]
            truth, answer = torch.zeros_like(labelled), torch.zeros_like(labelled)
            for member in members:
                truth |= labels == member
                answer |= leaf == member
            answer &= labelled
            counts[0] += int(torch.logical_and(truth, answer).sum())
            counts[1] += int(torch.logical_or(truth, answer).sum())
        scores = logits.sigmoid()
        for parent, child in self.h.edges:
            violated = (scores[:, child] > 0.5) & (scores[:, parent] <= 0.5) & labelled
            self.violations += int(violated.sum())

    def ious(self) -> dict[tuple[int, int], float | None]:
        """(level, class) -> IoU."""
        return {key: both / either if either else None for key, (both, either) in self.counts.items()}


# --- the network ---
def conv_block(in_channels: int, out_channels: int) -> nn.Module:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class PlainUNet(nn.Module):
    """The common U-Net over the same encoder: every stage up-samples, joins, and convolves twice, the last one too."""

    def __init__(self, encoder: str, num_nodes: int, channels: tuple[int, ...] = (256, 128, 64, 32, 16)) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        *skips, deepest = self.encoder.channels.values()
        inputs = (deepest, *channels[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(conv_block(i + skip, o), conv_block(o, o))
            for i, skip, o in zip(inputs, (*reversed(skips), 0), channels, strict=True)
        )
        self.head = nn.Conv2d(channels[-1], num_nodes, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Shape: (B, 3, H, W), multiples of 32 -> (B, N, H, W)."""
        *skips, x = self.encoder(images)
        for stage, skip in zip(self.stages, [*reversed(skips), None], strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = stage(x if skip is None else torch.cat((x, skip), dim=1))
        return self.head(x)
