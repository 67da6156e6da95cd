"""Random views of photos: drawn as a few numbers by seed, made on the device a batch at a time. Knows no tree."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.memory import to_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
GREY = (0.299, 0.587, 0.114)


class View(NamedTuple):
    """A square window in the photo's own pixels, which may reach over its edge, and what becomes of it, in order."""

    left: int
    top: int
    side: int
    flip: bool = False
    angle: float = 0.0  # degrees, counter-clockwise, about the window's centre
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclass
class RandomViews:
    """What views may be like, and how they are made. `mirror` is the label that each label (0 to 255) has in a mirror.

    Where a view reaches over the photo's edge it shows the colour of `show_outside`, labelled `void`.
    """

    size: int
    void: int
    scale_jitter: Sequence[float] | None = None
    hflip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    mirror: Tensor | None = None
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        self.show_outside(torch.tensor(IMAGENET_MEAN))
        self.mirror = self.mirror if self.mirror is None else self.mirror.to(self.device, torch.uint8)
        widest = math.radians(min(45, self.rotation))
        self.margin = math.ceil(self.size * (math.cos(widest) + math.sin(widest) - 1) / 2)  # for corners that turn in

    def show_outside(self, colour: Tensor) -> None:
        """Sets the colour of what lies outside, in units of 1: the mean that the network takes off. Shape: (3,)."""
        self.outside = (255 * colour).round().to(self.device, torch.uint8).view(3, 1, 1)

    def draw(self, seed: int, width: int, height: int) -> View:
        """A random view of a photo of that size; equal seeds draw equal views."""
        chance = random.Random(seed)
        side = max(1, round(self.size / chance.uniform(*(self.scale_jitter or (1, 1)))))
        # anywhere inside the photo; along an axis where the photo is smaller, the photo anywhere inside the window
        left, top = (chance.randint(min(0, n - side), max(0, n - side)) for n in (width, height))
        flip, angle = chance.random() < self.hflip, chance.uniform(-self.rotation, self.rotation)
        factors = [chance.uniform(1 - self.color_jitter, 1 + self.color_jitter) for _ in range(3)]
        return View(left, top, side, flip, angle, *factors)

    def make(self, photos: Sequence[Tensor], labels: Sequence[Tensor], views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """The views on the device, whose photos may lie there or in memory.

        Shape: (3, h, w) and (h, w) each -> (B, 3, size, size), (B, size, size); all uint8.
        """
        side = self.size + 2 * self.margin
        more = [math.ceil(self.margin * view.side / self.size) for view in views]  # the same in the photo's pixels
        images = self.outside.expand(len(views), 3, side, side).contiguous()
        seen = torch.full((len(views), side, side), self.void, dtype=torch.uint8, device=self.device)
        places = [
            (_place(v.top - m, v.side + 2 * m, y, side), _place(v.left - m, v.side + 2 * m, x, side))
            for v, m, (y, x) in zip(views, more, [map_.shape for map_ in labels], strict=True)
        ]
        windows = to_device([p[:, y, x] for p, ((y, _), (x, _)) in zip(photos, places, strict=True)], self.device)
        maps = to_device([m[y, x] for m, ((y, _), (x, _)) in zip(labels, places, strict=True)], self.device)
        for i, ((_, y), (_, x)) in enumerate(places):
            view, map_ = _resize(windows[i], maps[i], y.stop - y.start, x.stop - x.start)
            if views[i].flip:
                view, map_ = view.flip(-1), map_.flip(-1)
                map_ = map_ if self.mirror is None else self.mirror[map_.int()]
                x = slice(side - x.stop, side - x.start)
            images[i, :, y, x], seen[i, y, x] = view, map_
        if self.rotation:
            shares = [view.side / (view.side + 2 * m) for view, m in zip(views, more, strict=True)]
            images, seen = self._turn(images, seen, [math.radians(view.angle) for view in views], shares)
        if any(view[5:] != (1, 1, 1) for view in views):
            images = _coloured(images, self._numbers([view[5:] for view in views]))
        return images, seen

    def _turn(self, images: Tensor, seen: Tensor, angles: Sequence[float], shares: Sequence[float]) -> tuple:
        """The middle of larger views, turned; `shares` is how much of each side the middle takes."""
        turns = [(share * math.cos(a), share * math.sin(a)) for a, share in zip(angles, shares, strict=True)]
        theta = self._numbers([((c, -s, 0), (s, c, 0)) for c, s in turns])
        grid = F.affine_grid(theta, [len(angles), 3, self.size, self.size], align_corners=False)
        images = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        seen = F.grid_sample(seen[:, None].float(), grid, "nearest", padding_mode="border", align_corners=False)
        return images.round().to(torch.uint8), seen[:, 0].to(torch.uint8)

    def _numbers(self, rows: Sequence) -> Tensor:
        """A tensor on the device; nothing waits for its copy."""
        numbers = torch.tensor(rows, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        return numbers.to(self.device, non_blocking=True)


def _place(start: int, side: int, length: int, size: int) -> tuple[slice, slice]:
    """What a window of `side` pixels from `start` on shows of a photo, and where, in a view of `size` pixels."""
    first, last = max(0, start), min(length, start + side)
    offset = min(size - 1, round((first - start) * size / side))
    return slice(first, last), slice(offset, max(offset + 1, round((last - start) * size / side)))


def _resize(photo: Tensor, labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Shape: (3, h, w), (h, w) -> (3, height, width), (height, width); the photo stays bytes on the CPU alone."""
    photo = photo if photo.device.type == "cpu" else photo.float()  # CUDA has no kernel for bytes
    photo = F.interpolate(photo[None], (height, width), mode="bilinear", antialias=True)[0]
    # nearest: floor((i + 0.5) * old / new), in whole numbers; a CPU gathers so three times as fast as it interpolates
    rows, columns = (
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    labels = labels.gather(1, columns.expand(labels.shape[0], -1)).index_select(0, rows)
    return photo if photo.dtype == torch.uint8 else photo.round_(), labels


def _coloured(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation, in this order; in place, since new memory costs a CPU more than arithmetic.

    Shape: (B, 3, H, W) uint8, (B, 3) -> (B, 3, H, W) uint8.
    """
    brightness, contrast, saturation = factors.t()[..., None, None, None]
    images = images.float().mul_(brightness).clamp_(0, 255)
    torch.lerp(_grey(images).mean((-2, -1), keepdim=True), images, contrast, out=images).clamp_(0, 255)
    return torch.lerp(_grey(images), images, saturation, out=images).clamp_(0, 255).round_().to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (GREY[0] * red).add_(GREY[1] * green).add_(GREY[2] * blue)[:, None]
