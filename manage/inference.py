"""A photo through the network, whatever its size: the one way that evaluation, validation and prediction share.

    for rows, logits in logit_rows(network, image, size, tta="flip"):      # (1, N, rows, W), from top to bottom

A photo of more than `WHOLE` pixels goes through in windows that overlap by a quarter. A window says nothing within a
sixteenth of its side from an edge inside the photo, where it lacks context; from there its say grows to where its
neighbour's ends. Windows start at multiples of the network's stride, so that a pixel sees the same grid as in the
whole photo.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.dataset import Sample
from utils.errors import UserError, is_out_of_memory

WHOLE = 1024 * 2048  # pixels that go through at once
LAUNCHING = ("cuda",)  # devices on which small photos, one by one, would wait for launches
TILE, SMALLEST_TILE = 768, 256
BAND = 2**22  # logits in a band of rows; decoding takes four times as much
EXACT = 2**27  # logits of one photo that are kept in float32 (half a GiB); of a larger one they are kept in float16
SCALES = {"off": (1.0,), "flip": (1.0,), "full": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}

Rows = Iterator[tuple[slice, Tensor]]


class NotFinite(UserError):
    """The network's answer is no number: of no use for any photo."""


def logit_rows(
    network: nn.Module,
    image: Tensor,
    size: tuple[int, int],
    amp: str = "off",
    tta: str = "off",
    tile: int | None = None,
    mirror: Sequence[int] | None = None,
) -> Rows:
    """Logits at `size` in bands of rows, so that no photo is too large.

    `tile` None: windows only where the photo is large. `mirror`: the node that each node is in a mirror.
    Shape: (3, h, w) uint8 -> (rows, (1, N, rows, W) float32).
    Raises: NotFinite; what an allocator raises, see `photo_named`.
    """
    height, width = image.shape[-2:]
    # the larger views hold more detail than the fed size, of which a photo that was reduced gains
    grain = 2 if tta == "full" and height < size[0] else 1
    tile = tile or (TILE if height * width > WHOLE else max(height, width))

    def look(window: Tensor) -> Tensor:
        shape = (grain * window.shape[-2], grain * window.shape[-1])
        return mean_of_views(lambda view: forward(network, view, amp), window[None], shape, tta, mirror)[0]

    yield from _bands(_blended(look, image, tile, getattr(network, "stride", 32), grain), size)


@contextlib.contextmanager
def photo_named(name: str) -> Iterator[None]:
    """Errors say which photo they are about. Raises: UserError in place of what an allocator raises."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"photo {name!r}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"photo {name!r}: does not fit in memory; give --tile {SMALLEST_TILE}, end other work on this machine, "
            "or train with a short_side"
        ) from None


# --- several photos at once ---
def together(samples: Iterable[Sample], network: nn.Module, how: dict[str, Any]) -> Iterator[list[Sample]]:
    """Samples whose photos, padded to the network's stride, have one size, so that a GPU waits for no launches.

    Each one alone on a CPU, which gains nothing, and where views or windows would see what is padded.
    """
    stride, waiting = getattr(network, "stride", 32), {}
    for sample in samples:
        padded = tuple(-(-side // stride) * stride for side in sample.image.shape[-2:])
        group = waiting.setdefault(padded, [])
        group.append(sample)
        is_alone = sample.image.device.type not in LAUNCHING or how.get("tta", "off") != "off" or how.get("tile")
        if is_alone or (len(group) + 1) * padded[0] * padded[1] > WHOLE:
            yield waiting.pop(padded)
    yield from waiting.values()


def rows_of_each(network: nn.Module, group: Sequence[Sample], amp: str = "off", **how) -> Iterator[Rows]:
    """`logit_rows` of each photo, at the size of its labels; those that are `together` go through at once."""
    if len(group) > 1:
        height, width = (max(sample.image.shape[axis] for sample in group) for axis in (1, 2))
        try:
            logits = forward(network, torch.cat([_padded(s.image[None].float(), height, width) for s in group]), amp)
        except (NotFinite, RuntimeError, MemoryError):
            pass  # one by one says which photo it is, and takes less memory
        else:
            for sample, part in zip(group, logits, strict=True):
                yield _bands(part[:, : sample.image.shape[1], : sample.image.shape[2]], tuple(sample.labels.shape))
            return
    for sample in group:
        yield logit_rows(network, sample.image, tuple(sample.labels.shape), amp, **how)


# --- windows ---
def windows(length: int, tile: int, stride: int) -> list[tuple[slice, Tensor]]:
    """Where the windows of one axis lie, and their weights, which add up to 1 at every pixel."""
    tile = -(-tile // stride) * stride
    if length <= tile:
        return [(slice(0, length), torch.ones(length))]
    step = max(stride, 3 * tile // 4 // stride * stride)
    last = -((tile - length) // stride) * stride  # its end is the photo's, and its start on the grid of strides
    margin, total, found = (tile - step) / 4, torch.zeros(length), []
    for start in [*range(0, last, step), last]:
        inside = slice(start, min(start + tile, length))
        x = torch.arange(inside.start, inside.stop) + 0.5
        to_edge = torch.full_like(x, torch.inf) if start == 0 else x - start
        if inside.stop < length:
            to_edge = torch.minimum(to_edge, inside.stop - x)
        found.append((inside, ((to_edge - margin) / (2 * margin)).clamp(0, 1)))
        total[inside] += found[-1][1]
    return [(inside, weights / total[inside]) for inside, weights in found]


def _blended(look: Callable[[Tensor], Tensor], image: Tensor, tile: int, stride: int, grain: int) -> Tensor:
    """What all windows say. Shape: (3, h, w) -> (N, grain * h, grain * w)."""
    down, across = (windows(length, tile, stride) for length in image.shape[-2:])
    if len(down) == len(across) == 1:
        return look(image)
    total = None
    for rows, row_weights in down:
        for columns, column_weights in across:
            logits = look(image[:, rows, columns])
            if total is None:
                shape = (len(logits), grain * image.shape[-2], grain * image.shape[-1])
                total = logits.new_zeros(shape, dtype=torch.float32 if math.prod(shape) <= EXACT else torch.float16)
            weights = (row_weights[:, None] * column_weights).to(logits.device)
            weights = weights.repeat_interleave(grain, 0).repeat_interleave(grain, 1)
            top, left = grain * rows.start, grain * columns.start
            total[:, top : top + logits.shape[1], left : left + logits.shape[2]] += logits * weights
    return total


def _bands(logits: Tensor, size: tuple[int, int]) -> Rows:
    """What F.interpolate(mode="bilinear") makes of the logits, in bands of rows. Shape: (N, h, w)."""
    (height, width), source = logits.shape[1:], torch.arange(size[0], dtype=torch.float64, device=logits.device)
    source = ((source + 0.5) * (height / size[0]) - 0.5).clamp(0, height - 1)
    band = max(1, BAND // (len(logits) * size[1]))
    for start in range(0, size[0], band):
        rows = slice(start, min(start + band, size[0]))
        above = source[rows].long()
        strip = logits[:, above].float()
        if height != size[0]:
            below, share = logits[:, (above + 1).clamp(max=height - 1)].float(), (source[rows] - above).float()
            strip = torch.lerp(strip, below, share[:, None])
        if width != size[1]:
            shape = (strip.shape[1], size[1])
            strip = F.interpolate(strip[None], shape, mode="bilinear", align_corners=False)[0]
        yield rows, strip[None].contiguous()  # one plane a node, which decoding reads faster


# --- views ---
def scaled(side: int, scale: float) -> int:
    """A side at a scale of so many quarters, rounded; at least 1. In whole numbers, so that a symbol may stand in."""
    return (side * round(4 * scale) + 2) // 4


def mean_of_views(
    network: Callable[[Tensor], Tensor],
    photos: Tensor,
    size: Sequence[int],
    tta: str,
    mirror: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """The mean logits over scales and flips. Shape: (B, 3, h, w) in 0..255 -> (B, N, *size)."""
    total, count = 0, 0
    for scale in SCALES[tta]:
        view = photos
        if scale != 1:
            shape = [scaled(side, scale) for side in photos.shape[-2:]]
            view = F.interpolate(view.float(), shape, mode="bilinear", align_corners=False)
        for is_flipped in (False,) if tta == "off" else (False, True):
            logits = network(view.flip(-1)).flip(-1) if is_flipped else network(view)
            if is_flipped and mirror is not None:
                logits = logits[:, mirror]
            if scale != 1 or size[0] != photos.shape[-2] or size[1] != photos.shape[-1]:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            total, count = total + logits, count + 1
    return total / count


@torch.inference_mode()
def forward(network: nn.Module, photos: Tensor, amp: str) -> Tensor:
    """Logits of photos of any size. Shape: (B, 3, h, w) in 0..255 -> (B, N, h, w) float32. Raises: NotFinite."""
    height, width = photos.shape[-2:]
    least, amp = getattr(network, "stride", 32), chosen_amp(photos.device, amp)
    if min(height, width) < least:  # slimmer than the encoder's stride
        photos = _padded(photos.float(), max(height, least), max(width, least))
    with autocast(photos.device, amp):
        logits = network(photos)[..., :height, :width].float()
    if not logits.sum().isfinite():  # one pass; the sum of finite logits is far from overflowing
        half = "half precision may have overflowed: set amp=off or amp=bf16; otherwise " if amp != "off" else ""
        raise NotFinite(f"the network's logits are not finite; {half}its weights are spoilt: use another checkpoint")
    return logits


def _padded(photos: Tensor, height: int, width: int) -> Tensor:
    """Shape: (B, 3, h, w) -> (B, 3, height, width)."""
    return F.pad(photos, (0, width - photos.shape[-1], 0, height - photos.shape[-2]), mode="replicate")


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision for the network alone; the loss stays outside."""
    amp = chosen_amp(device, amp)
    kind = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=amp != "off")


def chosen_amp(device: torch.device, amp: str) -> str:
    """What `auto` means: bf16 on a GPU that has it, off elsewhere."""
    if amp != "auto":
        return amp
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 else "off"
