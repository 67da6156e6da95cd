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
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}  # read when gradio is imported

import utils  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
from PIL import Image

from configs.config import DECODE_RULES, default_decode
from manage.predictor import Decoding, Predictor, Result
from utils.cli import run_main
from utils.decode import probabilities
from utils.errors import UserError
from utils.images import photo_size, read_photo
from utils.visualize import write_maps

gr = importlib.import_module("gradio") if importlib.util.find_spec("gradio") else None
LARGEST = 2_000_000  # pixels; a larger photo is shown and predicted reduced

SKELETON = """
<div class="levels"></div>
<canvas role="img" aria-label="the photo with its parts laid over it"></canvas>
<p class="readout">Drop a photo, or take one; then hover over it, or touch it.</p>
<p class="legend"></p>
<label class="strength">strength <input type="range" min="0" max="100" value="60"></label>
"""
STYLE = """
.levels { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 8px; }
.levels button { padding: 6px 14px; border: 1px solid #767b83; border-radius: 6px; background: #fff; color: #1c1e21; }
.levels button[aria-pressed=true] { background: #0b62a4; border-color: #0b62a4; color: #fff; }
.levels:empty ~ canvas, .levels:empty ~ .strength { display: none; }
canvas { display: block; max-width: 100%; cursor: crosshair; touch-action: manipulation; }
.readout { min-height: 3em; margin: 8px 0; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; }
i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border: 1px solid #767b83; }
"""
SCRIPT = """
const find = (what) => element.querySelector(what);
const make = (tag, values) => Object.assign(document.createElement(tag), values);
const named = (node, share) => `${props.value.names[node]} ${Math.round(100 * share)} %`;
const loaded = (src) => new Promise((done) => { const image = make('img', { onload: () => done(image), src }); });
let level = 0, photo, maps;  // maps: the levels below each other, in pixels of (node, 255 * probability, 0, 255)
const at = (which, i) => 4 * (which * photo.width * photo.height + i);

function swatch(node, share) {
  const line = make('span'), box = line.appendChild(make('i'));
  box.style.background = `rgb(${props.value.colours[node]})`;
  line.append(named(node, share));
  return line;
}
function draw() {
  const { width, height } = photo, { names, colours, background, levels } = props.value, counts = names.map(() => 0);
  const canvas = Object.assign(find('canvas'), { width, height });
  canvas.style.width = `min(100%, ${Math.round(72 * width / height)}vh)`;
  const pen = canvas.getContext('2d', { willReadFrequently: true }), strength = find('input').value / 100;
  pen.drawImage(photo, 0, 0);
  const picture = pen.getImageData(0, 0, width, height), pixels = picture.data;
  for (let i = 0; i < width * height; i++) {
    const node = maps[at(level, i)];
    counts[node]++;
    if (!background.includes(node))
      for (let c = 0; c < 3; c++) pixels[4 * i + c] += strength * (colours[node][c] - pixels[4 * i + c]);
  }
  pen.putImageData(picture, 0, 0);
  const found = [...counts.keys()].filter((node) => counts[node]).sort((a, b) => counts[b] - counts[a]);
  find('.legend').replaceChildren(...found.map((node) => swatch(node, counts[node] / (width * height))));
  find('.levels').replaceChildren(...levels.map((name, i) => make('button',
    { textContent: name, ariaPressed: i === level, onclick: () => { level = i; draw(); } })));
}
function read(event) {
  if (event.target !== find('canvas') || !maps) return;
  const x = Math.floor(event.offsetX / event.target.clientWidth * photo.width);
  const y = Math.floor(event.offsetY / event.target.clientHeight * photo.height);
  const places = props.value.levels.map((_, which) => at(which, y * photo.width + x)).slice(level).reverse();
  const path = places.filter((place, step) => !step || maps[place] !== maps[places[step - 1]]);
  const steps = path.map((place) => named(maps[place], maps[place + 1] / 255));
  const title = make('b'), last = path[path.length - 1];
  title.append(swatch(maps[last], maps[last + 1] / 255));
  find('.readout').replaceChildren(title, make('br'), steps.join(' › '));
}
watch('value', async () => {
  if (!props.value) return;
  const picture = await loaded(props.value.maps), { width, height } = picture;
  photo = await loaded(props.value.photo);
  const pen = make('canvas', { width, height }).getContext('2d');
  pen.drawImage(picture, 0, 0);
  maps = pen.getImageData(0, 0, width, height).data;
  draw();
});
for (const [kind, act] of [['pointermove', read], ['pointerdown', read], ['input', draw]])
  element.addEventListener(kind, act);
"""


def predict(predictor: Predictor, path: str) -> Result:
    """A photo with its logits, at most LARGEST pixels of it. Raises: UserError for a file that cannot be read."""
    width, height = photo_size(path)
    shrink = min(1.0, (LARGEST / (width * height)) ** 0.5)
    return predictor(read_photo(path, None if shrink == 1 else max(1, int(min(width, height) * shrink))))


def decode_again(predictor: Predictor, result: Result, rule: str, offset: float) -> Result:
    """The same logits by another rule, with another offset of the background."""
    h, own = predictor.hierarchy, predictor.decoding
    bias = (own.root_bias if rule == own.rule else {}) | {h.names[v]: offset for v in h.background}
    leaves = Decoding(rule, bias)(result.logits[None].float(), h)[0]
    return replace(result, leaves=leaves.cpu().numpy())


def to_show(result: Result, criterion: str | dict[str, float]) -> dict[str, Any]:
    """What the page's script draws: the photo, and class and probability of each pixel at each level."""
    h, sheets = result.hierarchy, []
    scores = probabilities(default_decode(criterion), result.logits[None], h)[0]
    for nodes in result.levels:
        share = scores.gather(0, torch.from_numpy(nodes).long()[None])[0]
        sheets.append(np.dstack([nodes, (255 * share).round().byte().numpy(), np.zeros_like(nodes)]))
    tree = {"names": h.names, "colours": h.colours, "background": sorted(h.background), "levels": h.level_names}
    photo, maps = data_uri(result.photo, "JPEG", quality=90), data_uri(Image.fromarray(np.concatenate(sheets)), "PNG")
    return {"photo": photo, "maps": maps, **tree}


def data_uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_download(result: Result, photo: Path) -> str:
    """A zip of the label map of each level and the overlay, as tools/predict.py writes them."""
    folder = Path(tempfile.mkdtemp(prefix="hseg-demo-")) / photo.stem
    write_maps(folder, photo.stem, np.asarray(result.photo), result.leaves, result.hierarchy)
    return shutil.make_archive(str(folder), "zip", folder)


def build(predictor: Predictor) -> "gr.Blocks":
    """The page."""
    h, own = predictor.hierarchy, predictor.decoding
    bias = [own.root_bias.get(h.names[v], 0.0) for v in sorted(h.background)]

    def refresh(path: str | None, result: Result | None, rule: str, offset: float) -> tuple:
        if result is None:
            return None, None, gr.DownloadButton(interactive=False)
        result = decode_again(predictor, result, rule, offset)
        file = gr.DownloadButton(value=to_download(result, Path(path)), interactive=True)
        return result, to_show(result, predictor.config.criterion), file

    def begin(path: str | None, rule: str, offset: float) -> tuple:
        try:
            return refresh(path, predict(predictor, path) if path else None, rule, offset)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="Parts of a photo", analytics_enabled=False) as page:
        gr.Markdown(f"# Parts of a photo\nmodel {predictor.config.exp_name} · tree {h.name}, {h.num_leaves} parts")
        with gr.Row():
            with gr.Column(scale=1):
                photo = gr.Image(type="filepath", image_mode=None, label="Photo", sources=["upload", "webcam"])
                photo.preprocess = lambda file: file and file.path  # read by us, who can say what is wrong with it
            with gr.Column(scale=2):
                viewer = gr.HTML(html_template=SKELETON, css_template=STYLE, js_on_load=SCRIPT, apply_default_css=False)
        with gr.Row():
            rule = gr.Dropdown(DECODE_RULES, value=own.rule, label="Decoding rule")
            offset = gr.Slider(-5, 5, *bias[:1], step=0.1, label="Offset of the background", visible=bool(bias))
            download = gr.DownloadButton("Download the masks", interactive=False)
        state = gr.State()
        photo.change(begin, [photo, rule, offset], [state, viewer, download])
        for one in (rule, offset):
            one.change(refresh, [photo, state, rule, offset], [state, viewer, download], trigger_mode="always_last")
    return page


def launch(page: "gr.Blocks", **options) -> tuple:
    """Serves the page to this machine alone, with no font to load from elsewhere."""
    options |= {"theme": gr.themes.Base(font="system-ui", font_mono="monospace"), "ssr_mode": False, "footer_links": []}
    return page.launch(server_name="127.0.0.1", share=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="F", help="of train.py, or an experiment (default: the shipped model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args()
    if gr is None:
        raise UserError("the page needs gradio: pip install -r requirements-demo.txt")
    predictor = Predictor.load(args.checkpoint, args.device)
    print(f"photos are predicted by {predictor}")
    launch(build(predictor), inbrowser=not args.no_browser, server_port=args.port)


if __name__ == "__main__":
    run_main(main)
