"""Exports a checkpoint: photos in, label maps and scores out; or as a folder to hand on.

    python tools/export.py --checkpoint best.pt --out exported
    python tools/export.py --checkpoint best.pt --out exported --format torch,onnx --check data/pascal_part/JPEGImages
    python tools/export.py --checkpoint best.pt --out exported --format folder --licence CC-BY-4.0

It writes model.pt2 (torch.export) and model.onnx, each one self-contained program, with model.json (the tree, the
rule, and what the input must be); and a folder `model` of model.safetensors, config.json, tree.json and a card
README.md, which Predictor.load and tools/predict.py take in place of a checkpoint.

    input   photos    (B, 3, H, W) RGB 0..255, uint8 or with --dtype float32 float; any B, H and W
    output  leaves    (B, H, W) uint8 node ids
            scores    (B, N, H, W) float32 in [0, 1]

Normalisation, padding, views of --tta, and decoding with the checkpoint's root_bias are inside. Resizing is not: where
model.json names a short_side, resize photos to it first. --check compares the label maps of real photos with PyTorch's
and fails where fewer than 99.99 % of pixels agree. Needs: pip install -r requirements-export.txt (torch alone does not)
"""

import argparse
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor, nn

from configs.config import DECODE_RULES, REPOSITORY, TTA, Config, differences, save_config
from manage import inference
from manage.checkpoint import checkpoint_digest, find_model
from manage.predictor import Predictor
from manage.tables import shown
from utils.cli import progress, run_main
from utils.decode import leaf_bias, leaf_scores
from utils.errors import UserError
from utils.files import read_json, write_json, write_whole
from utils.images import PHOTO_SUFFIXES, read_photo

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx", "folder": "model"}
PACKAGES = {"torch": (), "onnx": ("onnx", "onnxruntime", "onnxscript"), "folder": ("safetensors",)}
LEAST_AGREEMENT = 0.9999

Program = Callable[[Tensor], Tensor]  # photos -> leaves


class Exportable(nn.Module):
    """The network with all that surrounds it in `Predictor`, as tensor operations alone."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network, self.rule, self.hierarchy = predictor.network, predictor.decoding.rule, predictor.hierarchy
        self.tta, mirror = predictor.how["tta"], predictor.how["mirror"]
        self.register_buffer("mirror", None if mirror is None else torch.tensor(mirror, device=predictor.device))
        self.register_buffer("leaf_ids", self.hierarchy.leaf_index(predictor.device).clone())
        self.register_buffer(
            "bias",
            leaf_bias(predictor.decoding.biases(self.hierarchy), self.hierarchy, predictor.device, torch.float32),
        )
        self.requires_grad_(False)

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Shape: (B, 3, H, W) in 0..255 -> (B, H, W) uint8 node ids, (B, N, H, W) scores."""
        logits = self._mean_of_views(photos)
        flat = logits.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(logits.shape[1], -1)  # (N, BHW)
        scores = leaf_scores(self.rule, flat, self.hierarchy)
        if self.bias is not None:
            scores = scores + self.bias
        leaves = self.leaf_ids.index_select(0, scores.max(0).indices).to(torch.uint8)
        return leaves.view(-1, *logits.shape[2:]), logits.sigmoid()

    def _mean_of_views(self, photos: Tensor) -> Tensor:
        """As manage/inference.py does for one photo, in a form whose symbolic sizes can be followed."""
        if self.tta == "off":
            return self._logits(photos)
        size, views = photos.shape[-2:], []
        for scale in inference.SCALES[self.tta]:
            shape = [inference.scaled(side, scale) for side in size]
            view = photos if scale == 1 else F.interpolate(photos.float(), shape, mode="bilinear", align_corners=False)
            flipped = self._logits(view.flip(-1)).flip(-1)
            pair = (self._logits(view), flipped if self.mirror is None else flipped.index_select(1, self.mirror))
            for logits in pair:
                if scale != 1:
                    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
                views.append(logits)
        return sum(views) / len(views)

    def _logits(self, photos: Tensor) -> Tensor:
        height, width = photos.shape[-2:]
        logits = self.network(_to_multiple(photos.float(), self.network.stride))
        # not a slice: its symbolic size would be a minimum, which stays undecided
        return logits.narrow(-2, 0, height).narrow(-1, 0, width)


def _to_multiple(images: Tensor, stride: int) -> Tensor:
    """Pads as the network would, in a form whose symbolic sizes are seen to be multiples of the stride."""
    height, width = images.shape[-2:]
    rows, columns = stride * ((height + stride - 1) // stride), stride * ((width + stride - 1) // stride)
    return F.pad(images, (0, columns - width, 0, rows - height), mode="replicate")


def export_torch(model: Exportable, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """The program for any batch and size, batches of 1 and photos 1 pixel wide included."""
    example = torch.zeros(2, 3, 70, 90, dtype=dtype, device=model.leaf_ids.device)
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    # without it every size is taken to be other than 1
    with fx_config.patch(backed_size_oblivious=True):
        return torch.export.export(model, (example,), dynamic_shapes=(any_size,), strict=False)


def export_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes an ONNX file with its weights inside."""
    sizes = {0: "batch", 2: "height", 3: "width"}
    onnx_program = torch.onnx.export(
        program,
        input_names=["photos"],
        output_names=["leaves", "scores"],
        dynamic_shapes=(sizes,),
        dynamo=True,
        verbose=False,
    )
    onnx_program.save(str(path), external_data=False)


def open_torch(path: Path, device: torch.device) -> Program:
    module = torch.export.load(path).module()
    return lambda photos: module(photos.to(device))[0].cpu()


def open_onnx(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda photos: torch.from_numpy(session.run(None, {name: photos.cpu().numpy()})[0])


@torch.no_grad()
def agreement(program: Program, predictor: Predictor, photos: Sequence[Path], dtype: torch.dtype, name: str) -> float:
    """Share of all pixels for which the program names the same leaf as `Predictor`, at the size the network sees."""
    same = total = 0
    for path in progress(photos, desc=f"check {name}", unit="photo"):
        image = torch.from_numpy(np.array(predictor.fed(read_photo(path)))).permute(2, 0, 1).to(predictor.device)
        logits = inference.photo_logits(predictor.network, image, tuple(image.shape[1:]), **predictor.how)
        expected = predictor.decoding(logits, predictor.hierarchy)[0].cpu()
        same += int((program(image[None].to(dtype).contiguous())[0] == expected).sum())
        total += expected.numel()
    return same / total


# --- a folder to hand on ---
def export_folder(predictor: Predictor, checkpoint: Path, folder: Path, licence: str) -> None:
    """What Predictor.load takes as well as a checkpoint."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    own = {"decode": predictor.decoding.rule, "root_bias": predictor.decoding.root_bias, "tta": predictor.how["tta"]}
    config = replace(predictor.config, **own)
    weights = {key: value.contiguous() for key, value in predictor.network.state_dict().items()}
    write_whole(save(weights), folder / "model.safetensors")
    save_config(config, folder / "config.json")
    write_json(predictor.hierarchy.to_dict(), folder / "tree.json")
    write_whole(card(predictor, config, scores_of(checkpoint, config), licence), folder / "README.md")


def scores_of(checkpoint: Path, config: Config) -> dict | None:
    """The scores.json of an evaluation of this checkpoint with these options, where there is one."""
    digest = checkpoint_digest(checkpoint)
    for folder in (config.experiment_dir, *checkpoint.resolve().parents[1:3]):
        for path in sorted(folder.glob("evaluation/*/scores.json")):
            record = read_json(path)
            options = [record.get(key) for key in ("checkpoint_sha256", "decode", "root_bias", "tta")]
            if options == [digest, config.decode, config.root_bias, config.tta]:
                return record
    return None


def card(predictor: Predictor, config: Config, record: dict | None, licence: str) -> str:
    """README.md: scores, classes, recipe, licence."""
    h, lines = predictor.hierarchy, []
    if record is None:
        lines.append("Not evaluated: run evaluate.py on this checkpoint, and export it again with --overwrite.")
    else:
        lines += [f"On {record['photos']} photos:", "", "| score | |", "|---|---|"]
        lines += [f"| {name} | {shown(name, value).strip()} |" for name, value in record["scores"].items()]
    classes = [
        f"- level {level + 1}, {name}: {', '.join(h.names[node] for node in h.level_classes[level])}"
        for level, name in enumerate(h.level_names)
    ]
    recipe = [f"    {key}: {json.dumps(value)}" for key, (value, _) in differences(config, Config()).items()]
    return CARD.format(
        licence=licence,
        name=config.exp_name,
        tree=h.name,
        how=str(predictor),
        scores="\n".join(lines),
        classes="\n".join(classes),
        recipe="\n".join(recipe),
    )


CARD = """---
license: {licence}
tags: [image-segmentation, hierarchical-segmentation]
---
# {name}

Segments photos by the label tree `{tree}`, at every level at once; {how}.

    result = Predictor.load("this/folder")(Image.open("photo.jpg"))   # from manage.predictor import Predictor

## Scores, in percent (mistake_severity: a height in the tree)

{scores}

## Classes

{classes}

## Recipe

What differs from the defaults of configs/config.py:

{recipe}

## Licence

{licence}
"""


# --- the command ---
def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, metavar="F", help="a .pt file, or an experiment's name or folder"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="D", help="folder for the exported files")
    parser.add_argument("--format", default=",".join(FORMATS), metavar="A,B", help="some of %(default)s (default: all)")
    parser.add_argument("--dtype", default="uint8", choices=("uint8", "float32"), help="of the input photos")
    parser.add_argument("--decode", choices=DECODE_RULES, help="another rule than the checkpoint's")
    parser.add_argument("--tta", choices=TTA, help="other views than the checkpoint's")
    parser.add_argument("--licence", default="unknown", help="for the card, such as cc-by-4.0")
    parser.add_argument("--check", type=Path, metavar="DIR", help="a folder of real photos to compare with PyTorch on")
    parser.add_argument("--check-photos", type=int, default=20, metavar="N", help="how many of them (default 20)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier exports in --out")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> list[str]:
    """The formats asked for.

    Raises: UserError for an unknown one, for packages that are not there, and for files that are.
    """
    formats = [name.strip() for name in arguments.format.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format {arguments.format}: {name!r} is not one of {', '.join(FORMATS)}")
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            others = ",".join(other for other in formats if not PACKAGES[other]) or "torch"
            raise UserError(
                f"--format {name} needs {', '.join(missing)}: pip install -r requirements-export.txt, or give "
                f"--format {others}"
            )
    for name in (*(FORMATS[name] for name in formats), "model.json"):
        if (arguments.out / name).exists() and not arguments.overwrite:
            raise UserError(f"{arguments.out / name} exists already; choose another --out, or give --overwrite")
    return formats


def photos_in(folder: Path, limit: int) -> list[Path]:
    """Raises: UserError where there are none."""
    inside = folder.iterdir() if folder.is_dir() else ()
    photos = sorted(path for path in inside if path.suffix.lower() in PHOTO_SUFFIXES)[: max(limit, 1)]
    if not photos:
        raise UserError(f"--check {folder}: expected a folder with photos ({', '.join(PHOTO_SUFFIXES)})")
    return photos


def description(predictor: Predictor, dtype: str) -> dict:
    """What model.json says."""
    return {
        "input": {"name": "photos", "shape": ["batch", 3, "height", "width"], "dtype": dtype, "values": "RGB, 0..255"},
        "outputs": {"leaves": "(batch, height, width) uint8", "scores": "(batch, nodes, height, width) float32"},
        "short_side": predictor.config.short_side,
        "decode": predictor.decoding.rule,
        "root_bias": predictor.decoding.root_bias,
        "tta": predictor.how["tta"],
        "tree": predictor.hierarchy.to_dict(),
    }


def main() -> int:
    arguments = read_arguments()
    formats = check_arguments(arguments)
    photos = photos_in(arguments.check, arguments.check_photos) if arguments.check else []
    checkpoint = find_model(arguments.checkpoint, REPOSITORY)
    predictor = Predictor.load(checkpoint, "cpu", decode=arguments.decode, tta=arguments.tta)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if "folder" in formats:
            export_folder(predictor, checkpoint, arguments.out / FORMATS["folder"], arguments.licence)
            print(f"wrote {arguments.out / FORMATS['folder']}: weights, config, tree and card, for Predictor.load")
        programs = [name for name in formats if name != "folder"]
        if programs:
            write_json(description(predictor, arguments.dtype), arguments.out / "model.json")
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written ({error.strerror})") from None
    worst = min([1.0, *export_programs(predictor, programs, arguments.out, getattr(torch, arguments.dtype), photos)])
    if worst < LEAST_AGREEMENT:
        print(
            f"error: less than {100 * LEAST_AGREEMENT} % of the pixels agree; do not use this export", file=sys.stderr
        )
    return int(worst < LEAST_AGREEMENT)


def export_programs(
    predictor: Predictor, formats: Sequence[str], out: Path, dtype: torch.dtype, photos: Sequence[Path]
) -> Iterator[float]:
    """Writes each program; its share of pixels that are as PyTorch's, where there are photos to check."""
    warnings.filterwarnings("ignore", category=UserWarning)  # the exporters' own, about their insides
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = export_torch(Exportable(predictor), dtype) if formats else None
    for name in formats:
        path = out / FORMATS[name]
        if name == "torch":
            torch.export.save(program, path)
        else:
            export_onnx(program, path)
        if not photos:
            print(f"wrote {path}, not checked; give --check DIR to compare it with PyTorch on real photos")
            continue
        exported = open_torch(path, predictor.device) if name == "torch" else open_onnx(path)
        share = agreement(exported, predictor, photos, dtype, name)
        print(f"wrote {path}: the same leaf as PyTorch on {100 * share:.4f} % of the pixels of {len(photos)} photos")
        yield share


if __name__ == "__main__":
    run_main(main)
