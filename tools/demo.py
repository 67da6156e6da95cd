"""Opens a page in the browser: drop a photo or take one, and see the parts laid over it at each level.

    pip install -r requirements-demo.txt
    python tools/demo.py
    python tools/demo.py --checkpoint experiments/quickstart/models_checkpoints/best.pt --port 8000

Hover over the photo for class, path and probability; choose another rule or offset; download the masks. Everything
stays on this machine: the page is bound to localhost, sends no usage data, and may load nothing from elsewhere.
"""

import argparse
import base64
import importlib.util
import io
import json
import os
import shutil
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # read when gradio is imported

import utils  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
from PIL import Image

from configs.config import DECODE_RULES, default_decode
from manage.inference import photo_named
from manage.predictor import Decoding, Predictor, Result
from utils.cli import run_main
from utils.decode import probabilities
from utils.errors import UserError
from utils.images import photo_header, read_photo
from utils.visualize import overlay, write_maps

gr = importlib.import_module("gradio") if importlib.util.find_spec("gradio") else None
LARGEST, LONGEST = 2_000_000, 10_000  # pixels, and a side: a larger photo is shown and predicted reduced
HINT = "Drop a photo, or take one; then hover over it, or touch it."

STYLE = """
.picture { display: block; max-width: 100%; max-height: 72vh; cursor: crosshair; touch-action: manipulation; }
.readout { min-height: 1.5em; margin: 8px 0; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; }
i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border: 1px solid #767b83; }
"""
SCRIPT = """
let seen, pixels;  // the maps that were read last; of them (node, 255 * probability, 0, 255) a pixel, root level first
function read(event) {
  const picture = event.target, maps = element.querySelector('.maps');
  if (!picture.matches('.picture')) return;
  const { naturalWidth: width, naturalHeight: height } = picture, names = JSON.parse(maps.dataset.names);
  if (seen !== maps.src) {
    const canvas = Object.assign(document.createElement('canvas'), { width, height: maps.naturalHeight });
    const pen = canvas.getContext('2d');
    pen.drawImage(maps, 0, 0);
    pixels = pen.getImageData(0, 0, width, maps.naturalHeight).data;
    seen = maps.src;
  }
  const x = Math.floor(event.offsetX / picture.clientWidth * width);
  const y = Math.floor(event.offsetY / picture.clientHeight * height), path = new Map();
  for (let row = y; row < maps.naturalHeight; row += height) {
    const i = 4 * (row * width + x);
    path.set(names[pixels[i]], Math.round(pixels[i + 1] / 2.55));
  }
  element.querySelector('.readout').textContent = [...path].map(([name, share]) => `${name} ${share} %`).join(' › ');
}
for (const kind of ['pointermove', 'pointerdown']) element.addEventListener(kind, read);
"""


def predict(predictor: Predictor, path: str | None) -> Result | None:
    """A photo with its logits, reduced if it is large. Raises: UserError for one that cannot be read or predicted."""
    if path is None:
        return None
    with photo_named(path):
        _, size, _ = photo_header(path)
        shrink = min(1.0, (LARGEST / (size[0] * size[1])) ** 0.5, LONGEST / max(size))
        return predictor(read_photo(path, None if shrink == 1 else max(1, int(min(size) * shrink))))


def decode_again(predictor: Predictor, result: Result, rule: str, offset: float) -> Result:
    """The same logits by another rule, with another offset of the background."""
    h, own = predictor.hierarchy, predictor.decoding
    bias = (own.root_bias if rule == own.rule else {}) | {h.names[v]: offset for v in h.background}
    leaves = Decoding(rule, bias)(result.logits[None].float(), h)[0]
    return Result(result.photo, leaves.cpu().numpy(), result.logits, h)


def to_show(result: Result, level: int, criterion: str | dict[str, float]) -> str:
    """The overlay of a level, its classes by their share, and class and probability of each pixel for the script."""
    h, sheets = result.hierarchy, []
    scores = probabilities(default_decode(criterion), result.logits[None], h)[0]
    for nodes in reversed(result.levels):
        share = scores.gather(0, torch.from_numpy(nodes).long()[None])[0]
        sheets.append(np.dstack([nodes, (255 * share).round().byte().numpy(), np.zeros_like(nodes)]))
    picture, maps = overlay(np.asarray(result.photo), result.levels[level], h), np.concatenate(sheets)
    legend = [
        f'<span><i style="background: rgb{h.colours[node]}"></i>{escape(h.names[node])} {100 * share:.0f} %</span>'
        for share, node in sorted(((result.shares[h.names[v]], v) for v in h.level_classes[level]), reverse=True)
        if share
    ]
    return (
        f'<img class="picture" alt="the photo with its parts laid over it" src="{data_uri(picture, "JPEG")}">'
        f'<img class="maps" hidden alt="" src="{data_uri(maps, "PNG")}" data-names="{escape(json.dumps(h.names))}">'
        f'<p class="readout">{HINT}</p><p class="legend">{"".join(legend)}</p>'
    )


def data_uri(picture: np.ndarray, kind: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_download(result: Result, photo: Path) -> str:
    """A zip beside the uploaded photo of the label map of each level and the overlay, as tools/predict.py has them."""
    folder = photo.parent / "masks"
    write_maps(folder, photo.stem, np.asarray(result.photo), result.leaves, result.hierarchy)
    return shutil.make_archive(str(photo.with_suffix("")), "zip", folder)


def build(predictor: Predictor) -> "gr.Blocks":
    """The page."""
    h, own, criterion = predictor.hierarchy, predictor.decoding, predictor.config.criterion
    bias = [own.root_bias.get(h.names[v], 0.0) for v in sorted(h.background)]

    def begin(path: str | None) -> Result | None:
        try:
            return predict(predictor, path)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def show(path: str | None, predicted: Result | None, rule: str, offset: float, level: int) -> tuple:
        if predicted is None:
            return HINT, gr.DownloadButton(interactive=False)
        result = decode_again(predictor, predicted, rule, offset)
        masks = gr.DownloadButton(value=to_download(result, Path(path)), interactive=True)
        return to_show(result, level, criterion), masks

    with gr.Blocks(title="Parts of a photo", analytics_enabled=False) as page:
        gr.Markdown(f"# Parts of a photo\nmodel {predictor.config.exp_name} · tree {h.name}, {h.num_leaves} parts")
        with gr.Row():
            with gr.Column(scale=1):
                photo = gr.Image(type="filepath", image_mode=None, label="Photo", sources=["upload", "webcam"])
                photo.preprocess = lambda file: file and file.path  # read by us, who can say what is wrong with it
                rule = gr.Dropdown(DECODE_RULES, value=own.rule, label="Decoding rule")
                offset = gr.Slider(-5, 5, *bias[:1], step=0.1, label="Offset of the background", visible=bool(bias))
            with gr.Column(scale=2):
                level = gr.Radio([(name, i) for i, name in enumerate(h.level_names)], value=0, label="Level")
                viewer = gr.HTML(HINT, css_template=STYLE, js_on_load=SCRIPT, apply_default_css=False)
                download = gr.DownloadButton("Download the masks", interactive=False)
        predicted = gr.State()
        showing = (show, [photo, predicted, rule, offset, level], [viewer, download])
        photo.change(begin, photo, predicted).success(*showing)
        for one in (rule, offset, level):
            one.change(*showing, trigger_mode="always_last")
    return page


def launch(page: "gr.Blocks", **options) -> tuple:
    """Serves the page to this machine alone, with no font to load from elsewhere."""
    options |= {"theme": gr.themes.Base(font="system-ui", font_mono="monospace"), "ssr_mode": False, "footer_links": []}
    return page.launch(server_name="127.0.0.1", share=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="F", help="of train.py, or an experiment (default: the shipped model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args()
    if gr is None:
        raise UserError("the page needs gradio: pip install -r requirements-demo.txt")
    predictor = Predictor.load(args.checkpoint, args.device)
    print(f"photos are predicted by {predictor}")
    try:
        launch(build(predictor), inbrowser=not args.no_browser, server_port=args.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port}: {error}; choose another") from None


if __name__ == "__main__":
    run_main(main)
