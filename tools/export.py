"""Exports a model: as a program, photos in, label maps and scores out; or as files to hand on.

    python tools/export.py --out exported --format torch                  # the shipped model
    python tools/export.py --checkpoint quickstart --out exported --format torch,onnx --check data/sample/JPEGImages
    python tools/export.py --checkpoint best.pt --out exported --format checkpoint --name mine --licence CC-BY-4.0

    torch       <name>.pt2   torch.export: one self-contained program, with <name>.json (tree, rule, what goes in)
    onnx        <name>.onnx  the same
    checkpoint  <name>.pt    the network without its training, weights in half precision: a sixth of best.pt
    folder      <name>/      model.safetensors, config.json, tree.json

The last two come with a card (README.md: scores of all evaluations of the very file, classes, recipe, licence), and
are taken wherever a checkpoint is. A program is used without this project:

    input   photos    (B, 3, H, W) RGB 0..255, uint8 or with --dtype float32 float; any B, H and W
    output  leaves    (B, H, W) uint8 node ids
            scores    (B, N, H, W) float32 in [0, 1]

Normalisation, padding, views of --tta, and decoding with the checkpoint's root_bias are inside. Resizing is not: where
<name>.json names a short_side, resize photos to it first. --check compares the label maps of real photos with PyTorch's
and fails where fewer than 99.99 % of pixels agree. Needs: pip install -r requirements-export.txt (torch and checkpoint
do not).
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

from configs.config import DECODE_RULES, TTA, Config, differences
from manage import inference
from manage.checkpoint import checkpoint_digest, pack
from manage.predictor import Predictor, load_state
from manage.tables import percent, shown
from utils.cli import progress, run_main
from utils.decode import leaf_bias, leaf_scores
from utils.errors import UserError
from utils.files import read_json, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.images import PHOTO_SUFFIXES, read_photo

FORMATS = {"torch": ".pt2", "onnx": ".onnx", "checkpoint": ".pt", "folder": ""}  # and the ending of what is written
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "folder": ("safetensors",)}
OF_A_MACHINE = ("device", "num_workers", "cache", "n_val_photos")  # keys that a model does not take along
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


# --- files to hand on ---
def handed_on(predictor: Predictor) -> dict:
    """What a checkpoint needs for prediction, evaluation and `init_from`, and where it came from."""
    state, source = load_state(predictor.source), predictor.source
    own = {"decode": predictor.decoding.rule, "root_bias": predictor.decoding.root_bias, "tta": predictor.how["tta"]}
    origin = {
        "experiment": predictor.config.exp_name,
        "checkpoint": source.name,
        "sha256": checkpoint_digest(source),
        "commit": _commit_of(source.parents[1]),
    }
    return {
        "model": predictor.network.state_dict(),
        "ema": None,
        "config": replace(without_places(predictor.config), **own).to_dict(),
        "tree": predictor.hierarchy.to_dict(),
        "epoch": state.get("epoch", 0),
        "origin": state.get("origin", origin),
    }


def without_places(config: Config) -> Config:
    """The config without what is true of one machine alone: places outside the repository, and its device."""
    outside = {
        key: getattr(Config, key) or Path(value).name
        for key, value in config.to_dict().items()
        if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("..", "~")))
    }
    return replace(config, **outside, **{key: getattr(Config, key) for key in OF_A_MACHINE})


def _commit_of(experiment: Path) -> str:
    """The code that an experiment was started with."""
    path = experiment / "environment.json"
    return read_json(path)[0].get("commit", "unknown") if path.is_file() else "unknown"


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels in half precision; what is small stays as it is, and running variances could overflow."""
    return {key: value.half() if value.dim() > 1 else value for key, value in weights.items()}


def write_folder(state: dict, folder: Path) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in state["model"].items()}
    write_whole(save(weights), folder / "model.safetensors")
    write_json(state["config"], folder / "config.json")
    write_json(state["tree"], folder / "tree.json")


def evaluations_of(checkpoint: Path, config: Config) -> list[dict]:
    """The scores.json of every evaluation of this very file on all val photos, by its own rule first."""
    patterns = ("evaluation/*/scores.json", "experiments/*/evaluation/*/scores.json")
    folders = [config.experiment_dir, *checkpoint.resolve().parents[1:3]]  # of models/pretrained/F.pt: the repository
    paths = {path.resolve() for folder in folders for pattern in patterns for path in folder.glob(pattern)}
    digest, records = checkpoint_digest(checkpoint), [read_json(path) for path in sorted(paths)]
    records = [record for record in records if record.get("checkpoint_sha256") == digest]
    most = max((record["photos"] for record in records), default=0)
    own = (config.decode, config.tta)
    return sorted(
        (record for record in records if record["photos"] == most),
        key=lambda record: ((record["decode"], record["tta"]) != own, record["tta"]),
    )


def score_table(records: Sequence[dict]) -> list[str]:
    """A column an evaluation; a row a score, and a row a class at each level. In Markdown."""
    rows = [["", *(f"{record['decode']}, tta {record['tta']}" for record in records)], ["---"] * (1 + len(records))]
    rows += [[name, *(shown(name, record["scores"][name]) for record in records)] for name in records[0]["scores"]]
    for number, level in enumerate(records[0]["levels"]):
        for name in level["IoU"]:
            ious = [percent(record["levels"][number]["IoU"][name]) for record in records]
            rows.append([f"IoU of {name}, level {level['level']}", *ious])
    return [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]


def card(state: dict, records: Sequence[dict], licence: str) -> str:
    """README.md: scores, classes, recipe, licence."""
    config, h = Config(**state["config"]), Hierarchy.from_dict(state["tree"])
    scores = ["Not evaluated: run evaluate.py on this file, and export it again with --overwrite."]
    if records:
        scores = [f"On {records[0]['photos']} photos, in percent (mistake_severity: a height in the tree):", ""]
        scores += score_table(records)
    classes = [
        f"- level {level}, {name}: {', '.join(h.names[node] for node in nodes)}"
        for level, (name, nodes) in enumerate(zip(h.level_names, h.level_classes, strict=True), start=1)
    ]
    recipe = [f"    {key}: {json.dumps(value)}" for key, (value, _) in differences(config, Config()).items()]
    return CARD.format(
        licence=licence,
        name=config.exp_name,
        tree=h.name,
        origin=", ".join(f"{key} {value}" for key, value in state["origin"].items()),
        epoch=state["epoch"],
        scores="\n".join(scores),
        classes="\n".join(classes),
        recipe="\n".join(recipe),
    )


CARD = """---
license: {licence}
tags: [image-segmentation, hierarchical-segmentation]
---
# {name}

Segments photos by the label tree `{tree}`, at every level at once.

    result = Predictor.load("this/file")(Image.open("photo.jpg"))   # from manage.predictor import Predictor

## Scores

{scores}

## Classes

{classes}

## Recipe

{epoch} epochs; {origin}. What differs from the defaults of configs/config.py:

{recipe}

## Licence

{licence}
"""


# --- the command ---
def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="F", help="a .pt file, an experiment (default: the shipped model)")
    parser.add_argument("--out", required=True, type=Path, metavar="D", help="folder for the exported files")
    parser.add_argument("--name", default="model", metavar="N", help="of the exported files (default: %(default)s)")
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
        missing = [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            others = ",".join(other for other in formats if other not in PACKAGES) or "torch"
            raise UserError(
                f"--format {name} needs {', '.join(missing)}: pip install -r requirements-export.txt, or give "
                f"--format {others}"
            )
    files = [f"{arguments.name}{FORMATS[name]}" for name in formats]
    files += ["README.md"] if "checkpoint" in formats else []
    files += [f"{arguments.name}.json"] if {"torch", "onnx"} & {*formats} else []
    for name in files:
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
    predictor = Predictor.load(arguments.checkpoint, "cpu", decode=arguments.decode, tta=arguments.tta)
    print(f"exporting {predictor}")
    programs = [name for name in formats if name in ("torch", "onnx")]
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        export_files(predictor, [name for name in formats if name not in programs], arguments)
        if programs:
            write_json(description(predictor, arguments.dtype), arguments.out / f"{arguments.name}.json")
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written ({error.strerror})") from None
    worst = min([1.0, *export_programs(predictor, programs, arguments, photos)])
    if worst < LEAST_AGREEMENT:
        print(
            f"error: less than {100 * LEAST_AGREEMENT} % of the pixels agree; do not use this export", file=sys.stderr
        )
    return int(worst < LEAST_AGREEMENT)


def export_files(predictor: Predictor, formats: Sequence[str], arguments: argparse.Namespace) -> None:
    """Writes checkpoint and folder, each with its card. Raises: OSError."""
    for name in formats:
        path, state = arguments.out / f"{arguments.name}{FORMATS[name]}", handed_on(predictor)
        if name == "folder":
            write_folder(state, path)
            scored, beside = predictor.source, path
        else:
            write_whole(pack(state | {"model": halved(state["model"])}), path)
            scored, beside = path, path.parent
        records = evaluations_of(scored, Config(**state["config"]))
        write_whole(card(state, records, arguments.licence), beside / "README.md")
        print(f"wrote {path}, and its card {beside / 'README.md'} with the scores of {len(records)} evaluations")


def export_programs(
    predictor: Predictor, formats: Sequence[str], arguments: argparse.Namespace, photos: Sequence[Path]
) -> Iterator[float]:
    """Writes each program; its share of pixels that are as PyTorch's, where there are photos to check."""
    warnings.filterwarnings("ignore", category=UserWarning)  # the exporters' own, about their insides
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dtype = getattr(torch, arguments.dtype)
    program = export_torch(Exportable(predictor), dtype) if formats else None
    for name in formats:
        path = arguments.out / f"{arguments.name}{FORMATS[name]}"
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
