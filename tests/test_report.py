"""The files of an evaluation's report; tests/test_report_page.py looks at the page."""

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from manage import report
from manage.tables import summary
from tests.reference import tree_of
from utils.decode import DECODERS
from utils.hierarchy import Hierarchy
from utils.metrics import LevelScores, scores_from_confusion

EVIL = "</script><script>window.hacked = 1</script>"
IMAGE = "<img src=x onerror='window.hacked = 2'>"
VOID = 255


def hostile_tree(background: tuple[int, ...] = (0,)) -> Hierarchy:
    """Three levels, and names that break a page which takes them for HTML or for a template."""
    names = ["background", EVIL, IMAGE, "{{js}}", "arm & 'leg\"", "body"]
    parents = [None, 3, 3, 5, 5, None]
    return tree_of(parents, names, background, name=EVIL, levels=["parts", "halves", IMAGE], ignore_index=VOID)


def sample_id(i: int) -> str:
    return f"photo_{i:04}&<b>'é#%41?"


def draw(i: int, h: Hierarchy) -> tuple[torch.Tensor, torch.Tensor]:
    """Background, one other node and void, and logits that know them, less well from photo to photo."""
    random = torch.Generator().manual_seed(i)
    coarse = torch.tensor([0, 1 + i % 5], dtype=torch.uint8)[torch.randint(0, 2, (4, 6), generator=random)]
    coarse[0, 0] = VOID
    labels = coarse.repeat_interleave(10, 0).repeat_interleave(10, 1)  # 40 x 60
    targets, _ = h.encode(labels[None])
    logits = (targets[0] - 0.5) * 8 + torch.randn(targets[0].shape, generator=random) * (0.4 + i % 7 / 2)
    return labels, logits


def sampled(labels: torch.Tensor, leaves: torch.Tensor, logits: torch.Tensor, band: int = 7) -> report.SmallMaps:
    """What the page shows, from bands of a few rows."""
    sampler = report.MapSampler(labels, len(logits))
    for start in range(0, len(labels), band):
        sampler.add(slice(start, min(start + band, len(labels))), logits[:, start : start + band])
    return sampler.maps(leaves)


def make_report(folder: Path, h: Hierarchy, count: int) -> list[dict]:
    """A report of `count` drawn photos; returns what it knows of each."""
    pictures = folder / "pictures" / "report"
    meter, lines = LevelScores(h), []
    for i in range(count):
        labels, logits = draw(i, h)
        leaves = DECODERS["logit_sum"](logits[None], h)
        matrix, photo = meter.update(leaves, labels[None], logits[None]).numpy(), np.full((40, 60, 3), 120, np.uint8)
        report.write_photo(pictures, sample_id(i), photo, sampled(labels, leaves[0], logits))
        lines.append(report.photo_line(sample_id(i), [matrix], i % 7 / 10, labels.shape, h))
    result = meter.compute()
    scores = {
        "checkpoint": "best.pt",
        "epoch": 3,
        "decode": "logit_sum",
        "root_bias": {},
        "tta": "off",
        "left_out": {f"lost{EVIL}": IMAGE},
        "scores": summary(result),
        "levels": result["levels"],
        "rules": {rule: summary(result) for rule in ("logit_sum", "leaf")},
        "config": {"exp_name": EVIL},
        "tree": h.to_dict(),
        "environment": {"time": "now", "command": EVIL},
    }
    report.write_report(folder, scores, lines, h)
    return lines


@pytest.fixture(scope="module")
def h() -> Hierarchy:
    return hostile_tree()


def test_a_small_photo_is_kept_pixel_by_pixel_and_its_script_is_a_call_with_plain_data(h, tmp_path):
    labels, logits = draw(1, h)
    maps = sampled(labels, DECODERS["logit_sum"](logits[None], h)[0], logits)
    assert np.array_equal(maps.truth, labels)
    assert np.array_equal(maps.scores >= 128, logits[:, ::2, ::2] > 0)
    assert np.abs((maps.scores + 0.5) / 256 - torch.sigmoid(logits[:, ::2, ::2]).numpy()).max() <= 0.5 / 256 + 1e-6
    report.write_photo(tmp_path, sample_id(1), np.zeros((40, 60, 3), np.uint8), maps)
    script = (tmp_path / f"{sample_id(1)}.js").read_text(encoding="ascii")
    packed = base64.b64decode(script.removeprefix('hsegMaps("').removesuffix('");\n'), validate=True)
    assert zlib.decompress(packed) == b"".join(values.tobytes() for values in maps)


def test_a_large_photo_is_sampled_to_the_sides_that_the_page_shows():
    rows = torch.arange(600)[:, None].expand(600, 900) // 3
    maps = sampled(rows.to(torch.uint8), rows, rows / 200 - 2 + torch.zeros(2, 600, 900))
    assert maps.truth.shape == report.shown_size((600, 900)) == (171, 256)
    assert maps.scores.shape == (2, 86, 128)  # every other row and column of the maps
    score = torch.sigmoid(torch.from_numpy(maps.truth[::2, ::2] / 200 - 2))
    assert np.array_equal(maps.scores[1], (score * 256).to(torch.uint8))
    assert (np.diff(maps.truth[:, 0].astype(int)) > 0).all()
    assert np.array_equal(maps.truth, maps.leaves)
    maps = sampled(torch.zeros(1, 2000), torch.zeros(1, 2000), torch.zeros(3, 1, 2000))  # keeps one row
    assert maps.truth.shape == (1, 256)


def test_a_photo_is_sorted_by_the_scores_of_the_metric(h):
    matrix = np.zeros((h.num_nodes, h.num_nodes), np.int32)
    matrix[1, 4], matrix[2, 2] = 10, 5  # leaf 1 (below 3, below 5) is taken for leaf 4 (below 5)
    values = report.photo_line("a", [matrix], None, (40, 60), h)["values"]
    scores = scores_from_confusion(torch.from_numpy(matrix).long(), h)
    assert values[:3] == pytest.approx([scores[f"mIoU{level + 1}"] for level in range(h.num_levels)], abs=1e-5)
    assert values[3:] == [None, None, 0.0, 1.0, pytest.approx(1 / 3, abs=1e-5), 0.0, 1.0]
