"""A photo through the network: windows, bands and views say what the whole photo says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manage import inference
from manage.inference import logit_rows, photo_named
from utils.errors import UserError


class Edges(nn.Module):
    """A network that sees one pixel far, and counts the pixels of its largest input."""

    stride = 32

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.error, self.largest = nn.Conv2d(3, 4, 3, padding=1), error, 0
        self.layer.weight.data /= 99  # photos go up to 255

    def forward(self, photos: Tensor) -> Tensor:
        if self.error:
            raise self.error
        self.largest = max(self.largest, photos.shape[-2] * photos.shape[-1])
        return self.layer(photos.float())


def photo_logits(network: nn.Module, image: Tensor, size: tuple[int, int], **how) -> Tensor:
    """All bands together."""
    return torch.cat([logits for _, logits in logit_rows(network, image, size, **how)], dim=2)


def noise(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def plainly(network: nn.Module, image: Tensor, size: tuple[int, int]) -> Tensor:
    """The whole photo at once."""
    with torch.no_grad():
        logits = network.layer(image[None].float())
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("band", [2**23, 5000], ids=["one band", "many bands"])
@pytest.mark.parametrize("size", [(300, 500), (611, 703), (90, 77), (300, 703)])
def test_windows_and_bands_say_what_the_whole_photo_says(monkeypatch, size, band):
    monkeypatch.setattr(inference, "BAND", band)
    network, image = Edges(), noise(300, 500)
    rows, parts = zip(*logit_rows(network, image, size, tile=128), strict=True)
    assert network.largest == 128 * 128
    assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])]
    torch.testing.assert_close(torch.cat(parts, 2), plainly(network, image, size), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(photo_logits(network, image, size), plainly(network, image, size), atol=2e-4, rtol=1e-4)


def test_only_a_large_photo_goes_through_in_windows_and_is_kept_in_half_precision(monkeypatch):
    monkeypatch.setattr(inference, "WHOLE", 300 * 500)
    monkeypatch.setattr(inference, "TILE", 256)
    monkeypatch.setattr(inference, "EXACT", 1)
    for image, largest in ((noise(300, 500), 300 * 500), (noise(301, 500), 256 * 256)):
        network, size = Edges(), tuple(image.shape[1:])
        close = {"atol": 2e-3, "rtol": 2e-3}  # float16 rounds
        torch.testing.assert_close(photo_logits(network, image, size), plainly(network, image, size), **close)
        assert network.largest == largest


@pytest.mark.parametrize("tta", ["flip", "full"])
def test_the_logits_of_all_views_are_averaged(tta):
    network, image, size = Edges(), noise(64, 96), (64, 96)
    views, shape = [], list(size)
    for scale in inference.SCALES[tta]:
        scaled = F.interpolate(image[None].float(), [round(scale * side) for side in shape], mode="bilinear")
        with torch.no_grad():
            pair = network.layer(scaled), network.layer(scaled.flip(-1)).flip(-1)
        views += [F.interpolate(logits, shape, mode="bilinear") for logits in pair]
    expected = torch.stack(views).mean(0)
    torch.testing.assert_close(photo_logits(network, image, size, tta=tta), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_a_photo_that_does_not_fit_is_named_with_what_to_do(error):
    message = "photo 'a.jpg': does not fit in memory; give --tile 256"
    with pytest.raises(UserError, match=message), photo_named("a.jpg"):
        photo_logits(Edges(error), noise(60, 90), (60, 90))
    with pytest.raises(RuntimeError, match="another fault"), photo_named("a.jpg"):
        photo_logits(Edges(RuntimeError("another fault")), noise(60, 90), (60, 90))
