"""The report of an evaluation: index.html beside scores.json, for reading from disk without a server.

    sampler.add(rows, logits); maps = sampler.maps(leaves)    # on the network's device, photo by photo
    write_photo(folder, sample_id, photo, maps)               # pictures/report/<id>.jpg and <id>.js
    write_report(folder, scores, lines, hierarchy)            # index.html, once

Scores and confusions are plain HTML, written here; report_assets/gallery.js shows the photos. A page opened from disk
may run scripts but not read files. So the maps of each photo lie in a small script of their own, which the page runs
when that photo comes into view: 1,817 photos open as fast as ten.
"""

import base64
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from manage.tables import shown
from utils.hierarchy import Hierarchy
from utils.metrics import scores_from_confusion

MAP_SIDE = 256  # longer side of label maps in the page
CURVES = "../../metrics.jsonl"  # of the training whose checkpoint was scored
ASSETS = Path(__file__).parent / "report_assets"


class MapSampler:
    """What the page shows of a photo, sampled on the maps' device, band by band, so that little leaves it.

    Scores lie on every other row and column of the maps' grid, so that a score is of a pixel that the maps show.
    """

    def __init__(self, labels: Tensor, n_nodes: int) -> None:
        self.labels = labels
        self.rows, self.columns = (
            ((torch.arange(count) + 0.5) * size / count).long().to(labels.device)
            for size, count in zip(labels.shape, shown_size(labels.shape), strict=True)
        )
        size = n_nodes, len(self.rows[::2]), len(self.columns[::2])
        self.scores = torch.empty(size, dtype=torch.uint8, device=labels.device)

    def add(self, band: slice, logits: Tensor) -> None:
        """Shape: (N, rows, W), the rows `band` of the photo."""
        rows = self.rows[::2]
        seen = ((rows >= band.start) & (rows < band.stop)).nonzero().flatten()
        sampled = _cut(logits, rows[seen] - band.start, self.columns[::2]).float().sigmoid() * 256
        self.scores[:, seen] = sampled.clamp_(max=255).to(torch.uint8)

    def maps(self, leaves: Tensor) -> list[np.ndarray]:
        """Truth, leaves and scores, once all bands were added; a byte b is a score from b/256 to (b+1)/256.

        Shape: (H, W) -> (h, w), (h, w) node ids, (N, h/2, w/2).
        """
        both = [_cut(labels, self.rows, self.columns).to(torch.uint8) for labels in (self.labels, leaves)]
        return [values.cpu().numpy() for values in (*both, self.scores)]


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in the page: at most `MAP_SIDE` a side, and never finer than the photo."""
    scale = min(1.0, MAP_SIDE / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def _cut(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return values.index_select(-2, rows).index_select(-1, columns)


def write_photo(folder: Path, sample_id: str, photo: np.ndarray, maps: Sequence[np.ndarray]) -> None:
    """Writes <id>.jpg and <id>.js. Shape: photo (H, W, 3) uint8. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(photo)
    picture.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BILINEAR)
    picture.save(folder / f"{sample_id}.jpg", quality=80)
    packed = base64.b64encode(zlib.compress(b"".join(values.tobytes() for values in maps), level=1)).decode()
    (folder / f"{sample_id}.js").write_text(f'hsegMaps("{packed}");\n', encoding="ascii")


def photo_line(sample_id: str, matrix: Tensor, size: tuple[int, int], hierarchy: Hierarchy) -> dict[str, Any]:
    """What the page knows of every photo from the start: its size, and the values to sort by, see `write_report`.

    Shape: matrix (N, N), the photo's counts of (label, predicted leaf).
    """
    levels = scores_from_confusion(matrix, hierarchy)["levels"]
    iou: dict[str, float | None] = {}
    for level in reversed(levels):  # the finest level wins
        iou |= level["IoU"]
    values = [*(level["mIoU"] for level in levels), *(iou[name] for name in hierarchy.names)]
    values = [None if value is None else round(value, 5) for value in values]
    return {"id": sample_id, "size": shown_size(size)[::-1], "values": values}


# --- the page ---
def write_report(folder: Path, scores: dict[str, Any], photos: list[dict[str, Any]], hierarchy: Hierarchy) -> None:
    """Writes index.html from what scores.json holds and the line of each photo. Raises: OSError."""
    h, levels = hierarchy, scores["levels"]
    data = {
        "nodes": [{"name": name, "colour": colour} for name, colour in zip(h.names, h.colours, strict=True)],
        "background": sorted(h.background),
        "paths": h.paths,
        "order": h.preorder,
        "levels": [{"name": name, "table": table} for name, table in zip(h.level_names, h.level_tables, strict=True)],
        "photos": photos,
    }
    keys = [*(f"mIoU{level['level']}" for level in levels), *(f"IoU of {name}" for name in h.names)]
    files = ["scores.csv", "scores.json", *([CURVES] if (folder / CURVES).is_file() else [])]
    means = [(f"mIoU{level['level']} · {level['name']}", level["mIoU"]) for level in levels]
    others = [(name, value) for name, value in scores["scores"].items() if not name.startswith("mIoU")]
    totals = [(shown(name, value).strip(), escape(name.replace("_", " "))) for name, value in means + others]
    without = ", ".join(h.names[node] for node in sorted(h.background))
    how = [f"epoch {scores['epoch']}", f"{len(photos):,} photos", f"decoded by {scores['decode']}"]
    how += [f"root_bias {scores['root_bias']}"] if scores["root_bias"] else []
    how += [f"tta {scores['tta']}", f"tree {scores['tree']['name']}", scores["environment"]["time"]]
    faults = [f"{sample_id}: {fault}" for sample_id, fault in scores["left_out"].items()]
    parts = {
        "title": escape(f"{scores['config']['exp_name']}: {scores['checkpoint']}"),
        "subtitle": escape(" · ".join(how)),
        "links": " · ".join(f'<a href="{file}">{Path(file).name}</a>' for file in files),
        "experiment": escape(scores["config"]["exp_name"]),
        "totals": "".join(f'<div class="total"><b>{value}</b><span>{name}</span></div>' for value, name in totals),
        "means": escape(f"The mean leaves {without} out.") if without else "",
        "scores": "".join(_score_table(level, h) for level in levels),
        "confusion": "".join(_confusion_table(level, h) for level in levels),
        "legend": "".join(_legend_entry(node, h) for node in h.preorder),
        "keys": "".join(f'<option value="{i}">{escape(key)}</option>' for i, key in enumerate(keys)),
        "left_out": "".join(f'<p class="warning">in no score: {escape(fault)}</p>' for fault in faults),
        "config": escape(json.dumps(scores["config"], indent=2)),
        "environment": escape(json.dumps(scores["environment"], indent=2)),
        # "<" could end the script element that holds the data, whatever a class or a photo is called
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "css": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "js": (ASSETS / "gallery.js").read_text(encoding="utf-8"),
    }
    template = (ASSETS / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)  # one pass: data is never a template
    (folder / "index.html").write_text(page, encoding="utf-8")


def _cell(part: float, whole: float, style: str = "") -> str:
    """A share in percent."""
    return f'<td style="{style}">{100 * part / whole:.1f}</td>' if whole else "<td>–</td>"


def _class(node: int, h: Hierarchy) -> str:
    return f'<span class="swatch" style="background: rgb{h.colours[node]}"></span>{escape(h.names[node])}'


def _legend_entry(node: int, h: Hierarchy) -> str:
    path = h.paths[node]
    title = escape(" › ".join(h.names[v] for v in path))
    return f'<span title="{title}">{"›" * (len(path) - 1)}{_class(node, h)}</span>'


def _table(kind: str, level: dict[str, Any], head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Of HTML: the first cell of a row as it is to be read, the others as `<td>` elements."""
    title = f"Level {level['level']}: {escape(level['name'])}"
    lines = "".join(f"<tr><th>{first}</th>{''.join(cells)}</tr>" for first, *cells in rows)
    heads = "".join(f"<th><span>{escape(name)}</span></th>" for name in head)
    table = f'<table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="panel"><h3>{title}</h3>{table}</div>'


def _score_table(level: dict[str, Any], h: Hierarchy) -> str:
    counts, rows = np.array(level["confusion"]), []
    for i, name in enumerate(level["classes"]):
        hits, truth, predicted = counts[i, i], counts[i].sum(), counts[:, i].sum()
        shares = ((hits, truth + predicted - hits), (hits, predicted), (hits, truth), (truth, level["pixels"]))
        rows.append([_class(h.names.index(name), h), *(_cell(part, whole) for part, whole in shares)])
    means = {"mean": level["mIoU"]} | ({"with background": level["mIoU_with_background"]} if h.background else {})
    rows += [[name, _cell(mean or 0, mean is not None)] for name, mean in means.items()]
    return _table("scores", level, ("class", "IoU", "precision", "recall", "share"), rows)


def _confusion_table(level: dict[str, Any], h: Hierarchy) -> str:
    """Each cell the share of the row's true class."""
    rows = []
    for name, row in zip(level["classes"], level["confusion"], strict=True):
        total = sum(row)
        styles = (f"background: rgb(11 98 164 / {60 * count / total if total else 0:.0f}%)" for count in row)
        cells = (_cell(count, total, style) for count, style in zip(row, styles, strict=True))
        rows.append([_class(h.names.index(name), h), *cells])
    return _table("confusion", level, ["", *level["classes"]], rows)
