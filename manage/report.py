"""The report of an evaluation: index.html beside scores.json, for reading from disk without a server.

    sampler.add(rows, logits); maps = sampler.maps(leaves)    # on the network's device, photo by photo
    write_photo(folder, sample_id, photo, maps)               # pictures/report/<id>.jpg and <id>.js
    write_report(folder, scores, lines, hierarchy)            # index.html, once

A page opened from disk may run scripts but not read files. So the maps of each photo lie in a small script of their
own, which the page runs when that photo comes into view: 1,817 photos open as fast as ten.
"""

import base64
import html
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.hierarchy import Hierarchy
from utils.metrics import scores_from_confusion

MAP_SIDE = 256  # longer side of label maps in the page
CURVES = "../../metrics.jsonl"  # of the training whose checkpoint was scored
ASSETS = Path(__file__).parent / "report_assets"


class SmallMaps(NamedTuple):
    """What the page shows of a photo's maps: the nearest pixels on a coarse grid, and on half of it.

    Shape: truth, leaves (h, w) node ids; scores (N, s, t), byte b standing for the scores from b/256 to (b+1)/256.
    """

    truth: np.ndarray
    leaves: np.ndarray
    scores: np.ndarray


class MapSampler:
    """Samples a photo's maps on their device, band by band, so that little leaves it.

    Scores lie on every other row and column of the maps' grid, so that a score is of a pixel that the maps show.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.scores = labels, []
        self.rows, self.columns = (
            ((torch.arange(count) + 0.5) * size / count).long()
            for size, count in zip(labels.shape, shown_size(labels.shape), strict=True)
        )

    def add(self, band: slice, logits: Tensor) -> None:
        """Shape: (N, rows, W), the rows `band` of the photo."""
        rows = self.rows[::2]
        seen = rows[(rows >= band.start) & (rows < band.stop)] - band.start
        sampled = _cut(logits, seen, self.columns[::2]).float().sigmoid() * 256
        self.scores.append(sampled.clamp_(max=255).to(torch.uint8).cpu().numpy())

    def maps(self, leaves: Tensor) -> SmallMaps:
        """Shape: (H, W), once all bands were added."""
        both = (_cut(labels, self.rows, self.columns).to(torch.uint8).cpu().numpy() for labels in (self.labels, leaves))
        return SmallMaps(*both, np.concatenate(self.scores, axis=1))


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in the page: at most `MAP_SIDE` a side, and never finer than the photo."""
    scale = min(1.0, MAP_SIDE / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def _cut(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return values.index_select(-2, rows.to(values.device)).index_select(-1, columns.to(values.device))


def write_photo(folder: Path, sample_id: str, photo: np.ndarray, maps: SmallMaps) -> None:
    """Writes <id>.jpg and <id>.js. Shape: photo (H, W, 3) uint8. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(photo)
    picture.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BILINEAR)
    picture.save(folder / f"{sample_id}.jpg", quality=80)
    packed = zlib.compress(b"".join(values.tobytes() for values in maps), level=1)
    data = {
        "size": maps.leaves.shape[::-1],
        "scoreSize": maps.scores.shape[:0:-1],
        "packed": base64.b64encode(packed).decode(),
    }
    script = f"hsegPhoto({json.dumps(sample_id)}, {json.dumps(data)});\n"
    (folder / f"{sample_id}.js").write_text(script, encoding="ascii")


def photo_line(
    sample_id: str,
    matrices: Sequence[np.ndarray],
    violations: float | None,
    size: tuple[int, int],
    hierarchy: Hierarchy,
) -> dict[str, Any]:
    """What the page knows of every photo from the start: scores to sort by, classes to filter by, its size.

    Shape: the first of `matrices` (N, N), the photo's counts of (label, predicted leaf).
    """
    iou: list[float | None] = [None] * hierarchy.num_nodes
    truth, predicted = set(), set()
    levels = scores_from_confusion(torch.from_numpy(matrices[0]).long(), hierarchy)["levels"]
    for level, classes in reversed([*zip(levels, hierarchy.level_classes, strict=True)]):  # the finest level wins
        counts = np.array(level["confusion"])
        for i, node in enumerate(classes):
            iou[node] = _rounded(level["IoU"][hierarchy.names[node]])
            truth |= {node} if counts[i].any() else set()
            predicted |= {node} if counts[:, i].any() else set()
    return {
        "id": sample_id,
        "size": shown_size(size)[::-1],
        "violations": _rounded(violations),
        "mIoU": [_rounded(level["mIoU"]) for level in levels],
        "IoU": iou,
        "truth": sorted(truth),
        "predicted": sorted(predicted),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def write_report(folder: Path, scores: dict[str, Any], photos: list[dict[str, Any]], hierarchy: Hierarchy) -> None:
    """Writes index.html from what scores.json holds and the line of each photo. Raises: OSError."""
    data = {
        "title": f"{scores['config']['exp_name']}: {scores['checkpoint']}",
        "scores": scores,
        "tables": hierarchy.level_tables,
        "edges": hierarchy.edges,
        "order": hierarchy.preorder,
        "photos": photos,
        "curves": CURVES if (folder / CURVES).is_file() else None,
    }
    # "<" could end the script element that holds the data, whatever a class or a photo is called
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template, css, scores_js, gallery_js = (
        (ASSETS / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "scores.js", "gallery.js")
    )
    parts = {"title": html.escape(data["title"]), "data": text, "css": css, "js": scores_js + gallery_js}
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)  # one pass: data is never a template
    (folder / "index.html").write_text(page, encoding="utf-8")
