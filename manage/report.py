"""The report of an evaluation: index.html beside scores.json, for reading from disk without a server.

    sampler.add(rows, logits); maps = sampler.maps(leaves)               # on the network's device, photo by photo
    violations = write_photo(folder, sample_id, photo, maps, hierarchy)  # pictures/report/<id>.jpg and <id>.js
    write_report(folder, scores, lines, hierarchy)                       # index.html, once

A page opened from disk may run scripts but not read files. So the maps of each photo lie in a small script of their
own, which the page runs when that photo comes into view: 1,817 photos open as fast as ten.
"""

import base64
import html
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.metrics import scores_from_confusion

MAP_SIDE = 256  # longer side of label maps in the page
CURVES = "../../metrics.jsonl"  # of the training whose checkpoint was scored
ASSETS = Path(__file__).parent / "report_assets"


@dataclass
class SmallMaps:
    """What the page shows of a photo's maps: the nearest pixels on a coarse grid, and on half of it.

    Shape: truth, leaves (h, w) node ids; scores (N, s, t), byte b standing for the scores from b/256 to (b+1)/256;
    known (s, t), False at void. All uint8 or bool, on the CPU.
    """

    truth: np.ndarray
    leaves: np.ndarray
    scores: np.ndarray
    known: np.ndarray


class MapSampler:
    """Samples a photo's maps on their device, band by band, so that little leaves it.

    Scores lie on every other row and column of the maps' grid, so that a score is of a pixel that the maps show.
    """

    def __init__(self, labels: Tensor, ignore_index: int) -> None:
        self.labels, self.ignore_index = labels, ignore_index
        self.rows, self.columns = _grid(labels.shape)
        self.scores: list[np.ndarray] = []

    def add(self, band: slice, logits: Tensor) -> None:
        """Shape: (N, rows, W), the rows `band` of the photo."""
        rows = self.rows[::2]
        seen = torch.from_numpy(rows[(rows >= band.start) & (rows < band.stop)] - band.start).to(logits.device)
        sampled = logits.index_select(1, seen).index_select(2, torch.from_numpy(self.columns[::2]).to(logits.device))
        self.scores.append((sampled.float().sigmoid() * 256).clamp_(max=255).to(torch.uint8).cpu().numpy())

    def maps(self, leaves: Tensor) -> SmallMaps:
        """Shape: (H, W), once all bands were added."""
        rows, columns = (torch.from_numpy(index).to(leaves.device) for index in (self.rows, self.columns))
        truth, leaves = (
            labels.index_select(0, rows).index_select(1, columns).to(torch.uint8).cpu().numpy()
            for labels in (self.labels, leaves)
        )
        return SmallMaps(truth, leaves, np.concatenate(self.scores, axis=1), truth[::2, ::2] != self.ignore_index)


def _grid(shape: tuple[int, int]) -> list[np.ndarray]:
    """Rows and columns of a grid of at most `MAP_SIDE` by `MAP_SIDE` pixels; never finer than the photo."""
    scale = min(1.0, MAP_SIDE / max(shape))
    counts = [max(1, round(size * scale)) for size in shape]
    return [
        ((np.arange(count) + 0.5) * size / count).astype(np.int64) for size, count in zip(shape, counts, strict=True)
    ]


def write_photo(
    folder: Path, sample_id: str, photo: np.ndarray, maps: SmallMaps, hierarchy: Hierarchy
) -> dict[str, Any]:
    """Writes a photo's files; its size in the page, and its share of violated (pixel, edge) pairs.

    Shape: photo (H, W, 3) uint8.
    """
    picture = Image.fromarray(photo)
    picture.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BILINEAR)
    picture.save(folder / f"{sample_id}.jpg", quality=80)
    packed = zlib.compress(maps.truth.tobytes() + maps.leaves.tobytes() + maps.scores.tobytes(), level=1)
    data = {
        "size": maps.leaves.shape[::-1],
        "scoreSize": maps.scores.shape[:0:-1],
        "packed": base64.b64encode(packed).decode(),
    }
    script = f"hsegPhoto({json.dumps(sample_id)}, {json.dumps(data)});\n"
    (folder / f"{sample_id}.js").write_text(script, encoding="ascii")
    return {"size": data["size"], "violations": _rounded(violated_share(maps, hierarchy))}


def violated_share(maps: SmallMaps, hierarchy: Hierarchy) -> float | None:
    """The share of (known pixel, edge) pairs with s_child > 0.5 >= s_parent; None where nothing is known."""
    above = maps.scores[:, maps.known] >= 128
    if not hierarchy.edges or not above.shape[1]:
        return None
    parents, children = (list(nodes) for nodes in zip(*hierarchy.edges, strict=True))
    return float((above[children] > above[parents]).mean())


def photo_line(sample_id: str, matrix: np.ndarray, drawn: dict[str, Any], hierarchy: Hierarchy) -> dict[str, Any]:
    """What the page knows of every photo from the start: scores to sort by, classes to filter by, what was drawn.

    Shape: matrix (N, N), the photo's counts of (label, predicted leaf).
    """
    iou: list[float | None] = [None] * hierarchy.num_nodes
    truth, predicted = set(), set()
    levels = scores_from_confusion(torch.from_numpy(matrix).long(), hierarchy)["levels"]
    for level, classes in reversed([*zip(levels, hierarchy.level_classes, strict=True)]):  # the finest level wins
        counts = np.array(level["confusion"])
        for i, node in enumerate(classes):
            iou[node] = _rounded(level["IoU"][hierarchy.names[node]])
            truth |= {node} if counts[i].any() else set()
            predicted |= {node} if counts[:, i].any() else set()
    return drawn | {
        "id": sample_id,
        "mIoU": [_rounded(level["mIoU"]) for level in levels],
        "IoU": iou,
        "truth": sorted(truth),
        "predicted": sorted(predicted),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def write_report(folder: Path, scores: dict[str, Any], photos: list[dict[str, Any]], hierarchy: Hierarchy) -> Path:
    """Writes index.html from what scores.json holds and the line of each photo; returns its path.

    Raises: UserError where the folder cannot be written.
    """
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
    path = folder / "index.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror})") from None
    return path
