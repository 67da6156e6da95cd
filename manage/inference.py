"""A photo through the network, whatever its size: the one way that evaluation, validation and prediction share.

    logits = photo_logits(network, image, size, tta="flip")                # (1, N, H, W)
    for rows, logits in logit_rows(network, image, size):                  # (1, N, rows, W), from top to bottom

A photo of more than `WHOLE` pixels goes through in windows that overlap by a quarter. A window says nothing within a
sixteenth of its side from an edge inside the photo, where it lacks context; from there its say grows to where its
neighbour's ends. Windows start at multiples of the network's stride, so that a pixel sees the same grid as in the
whole photo.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manage.faults import is_out_of_memory
from utils.dataset import Sample
from utils.errors import UserError

WHOLE = 1024 * 2048  # pixels that go through at once
TILE, SMALLEST_TILE = 768, 256
BAND = 2**23  # logits in a band of rows; decoding takes four times as much
SCALES = {"off": (1.0,), "flip": (1.0,), "full": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}

Rows = Iterator[tuple[slice, Tensor]]


class NotFinite(UserError):
    """The network's answer is no number: of no use for any photo."""


def photo_logits(network: nn.Module, image: Tensor, size: tuple[int, int], amp: str = "off", **how) -> Tensor:
    """Logits of one photo at `size`, whatever size it is fed at. Shape: (3, h, w) uint8 -> (1, N, *size) float32."""
    bands = [logits for _, logits in logit_rows(network, image, size, amp, **how)]
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=2)


def logit_rows(
    network: nn.Module,
    image: Tensor,
    size: tuple[int, int],
    amp: str = "off",
    tta: str = "off",
    tile: int | None = None,
    mirror: Sequence[int] | None = None,
) -> Rows:
    """`photo_logits` in bands of rows, so that no photo is too large; where memory lacks, in smaller windows.

    `tile` None: windows only where the photo is large. `mirror`: the node that each node is in a mirror.
    Shape: (3, h, w) uint8 -> (rows, (1, N, rows, W) float32).
    Raises: NotFinite; what an allocator raises, where even the smallest windows are too large.
    """
    height, width = image.shape[-2:]
    # the larger views hold more detail than the fed size, of which a photo that was reduced gains
    grain = 2 if tta == "full" and height < size[0] else 1
    tile, is_begun = tile or (TILE if height * width > WHOLE else max(height, width)), False
    while True:
        try:
            parts = _blended(network, image, tile, grain, (amp, tta, mirror))
            for band in _resized(parts, (grain * height, grain * width), size):
                is_begun = True
                yield band
            return
        except (RuntimeError, MemoryError) as error:
            if is_begun or not is_out_of_memory(error) or tile <= SMALLEST_TILE:
                raise
        tile = max(SMALLEST_TILE, tile // 2)


# --- several photos at once ---
def pixels_at_once(device: torch.device, tta: str = "off", tile: int | None = None, **_) -> int:
    """Of the photos that go through together: a GPU waits for nothing but the next launch when they go one by one.

    Along other numbers of photos a GPU may round logits otherwise; a CPU gains nothing.
    """
    return WHOLE if device.type == "cuda" and tta == "off" and tile is None else 0


def of_one_size(samples: Iterable[Sample], stride: int, pixels: int) -> Iterator[list[Sample]]:
    """Samples whose photos, padded to the stride, have one size and at most `pixels` together; each one alone for 0."""
    waiting: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        padded = tuple(-(-side // stride) * stride for side in sample.image.shape[-2:])
        group = waiting.setdefault(padded, [])
        group.append(sample)
        if (len(group) + 1) * padded[0] * padded[1] > pixels:
            yield waiting.pop(padded)
    yield from waiting.values()


def rows_of_each(network: nn.Module, group: Sequence[Sample], amp: str = "off", **how) -> list[Rows]:
    """`logit_rows` of each photo, at its labels' size; several photos, padded to one size, go through together."""
    one_by_one = [logit_rows(network, s.image, tuple(s.labels.shape), amp, **how) for s in group]
    if len(group) == 1:
        return one_by_one
    stride = getattr(network, "stride", 32)
    height, width = (max(-(-s.image.shape[axis] // stride) * stride for s in group) for axis in (1, 2))
    padded = []
    for sample in group:
        h, w = sample.image.shape[-2:]
        padded.append(F.pad(sample.image[None].float(), (0, width - w, 0, height - h), mode="replicate"))
    try:
        with torch.inference_mode(), autocast(padded[0].device, amp):
            logits = network(torch.cat(padded)).float()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return one_by_one  # they find their own way
    return [_rows_of(part, sample, amp) for part, sample in zip(logits, group, strict=True)]


def _rows_of(logits: Tensor, sample: Sample, amp: str) -> Rows:
    """Raises: NotFinite, once the rows are asked for."""
    height, width = sample.image.shape[-2:]
    part = _finite(logits[:, :height, :width], chosen_amp(logits.device, amp))
    yield from _resized(iter([part]), (height, width), tuple(sample.labels.shape))


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
            f"photo {name!r}: does not fit in memory, even in windows of {SMALLEST_TILE}; end other work on this "
            "machine, make the photo smaller, or train with a short_side"
        ) from None


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


def _blended(network: nn.Module, image: Tensor, tile: int, grain: int, how: tuple) -> Iterator[Tensor]:
    """Shape: (3, h, w) -> parts of (N, grain * h, grain * w), from top to bottom."""
    stride = getattr(network, "stride", 32)
    down, across = (windows(length, tile, stride) for length in image.shape[-2:])
    if len(down) == len(across) == 1:
        yield _mean_of_views(network, image, grain, *how)
        return
    rest = None  # what the window row before has said of rows that this one speaks of, too
    for (rows, row_weights), below in zip(down, [*down[1:], None], strict=True):
        part = None
        for columns, column_weights in across:
            logits = _mean_of_views(network, image[:, rows, columns], grain, *how)
            if part is None:
                part = logits.new_zeros(*logits.shape[:2], grain * image.shape[-1])
            weights = (row_weights[:, None] * column_weights).to(logits.device)
            weights = weights.repeat_interleave(grain, 0).repeat_interleave(grain, 1)
            part[..., grain * columns.start : grain * columns.stop].addcmul_(logits, weights)
        if rest is not None:
            part[:, : rest.shape[1]] += rest
        done = grain * ((below[0].start if below else rows.stop) - rows.start)
        rest = part[:, done:].clone()
        yield part[:, :done]


def _resized(parts: Iterator[Tensor], fed: tuple[int, int], size: tuple[int, int]) -> Rows:
    """What F.interpolate(mode="bilinear") makes of all parts together, in bands of rows."""
    source = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * (fed[0] / size[0]) - 0.5).clamp(0, fed[0] - 1)
    above = source.long()
    below, share = (above + 1).clamp(max=fed[0] - 1), (source - above).float()
    held, top, row = None, 0, 0
    for part in parts:
        held, part = part if held is None else torch.cat([held, part], dim=1), None  # lets go of the part
        ready = int((below < top + held.shape[1]).sum())
        band = max(1, BAND // (held.shape[0] * size[1]))
        for start in range(row, ready, band):
            rows = slice(start, min(start + band, ready))
            strip = held[:, rows.start - top : rows.stop - top]
            if fed[0] != size[0]:
                a, b, weight = (index.to(held.device) for index in (above[rows] - top, below[rows] - top, share[rows]))
                strip = torch.lerp(held[:, a], held[:, b], weight[:, None])
            if fed[1] != size[1]:
                shape = (strip.shape[1], size[1])
                strip = F.interpolate(strip[None], shape, mode="bilinear", align_corners=False)[0]
            yield rows, strip[None].contiguous()  # one plane a node, which decoding reads faster
        row = ready
        if row < size[0]:
            kept = min(int(above[row]), top + held.shape[1])
            held, top = held[:, kept - top :].clone(), kept


def scaled(side: int, scale: float) -> int:
    """A side at a scale of so many quarters, rounded; at least 1. In whole numbers, so that a symbol may stand in."""
    return (side * round(4 * scale) + 2) // 4


@torch.inference_mode()
def _mean_of_views(
    network: nn.Module, image: Tensor, grain: int, amp: str, tta: str, mirror: Sequence[int] | None
) -> Tensor:
    """The mean logits over scales and flips. Shape: (3, h, w) uint8 -> (N, grain * h, grain * w)."""
    size, total, count = [grain * side for side in image.shape[-2:]], 0, 0
    for scale in SCALES[tta]:
        view = image[None]
        if scale != 1:
            shape = [scaled(side, scale) for side in image.shape[-2:]]
            view = F.interpolate(view.float(), shape, mode="bilinear", align_corners=False)
        for is_flipped in (False,) if tta == "off" else (False, True):
            logits = _forward(network, view.flip(-1) if is_flipped else view, amp)
            if is_flipped:
                logits = logits.flip(-1) if mirror is None else logits.flip(-1)[:, list(mirror)]
            if list(logits.shape[-2:]) != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            if tta == "off":
                return logits[0]
            total, count = total + logits, count + 1
    return total[0] / count


def _forward(network: nn.Module, images: Tensor, amp: str) -> Tensor:
    """Padding is cut off before anything is scored. Shape: (1, 3, h, w) in 0..255 -> (1, N, h, w) float32.

    Raises: NotFinite.
    """
    height, width = images.shape[-2:]
    least = getattr(network, "stride", 32)
    if min(height, width) < least:  # slimmer than the encoder's stride
        images = F.pad(images.float(), (0, max(0, least - width), 0, max(0, least - height)), mode="replicate")
    amp = chosen_amp(images.device, amp)
    with autocast(images.device, amp):
        logits = network(images)
    return _finite(logits.float()[..., :height, :width], amp)


def _finite(logits: Tensor, amp: str) -> Tensor:
    """The logits. Raises: NotFinite."""
    if not logits.sum().isfinite():  # one pass; the sum of finite logits is far from overflowing
        half = "half precision may have overflowed: set amp=off or amp=bf16; otherwise " if amp != "off" else ""
        raise NotFinite(f"the network's logits are not finite; {half}its weights are spoilt: use another checkpoint")
    return logits


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
