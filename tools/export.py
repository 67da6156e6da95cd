"""Exports a model: as a program, photos in, label maps and scores out; or as files to hand on.

    python tools/export.py --out exported/model.pt2                   # the shipped model
    python tools/export.py --checkpoint quickstart --out exported/model.onnx --tta flip
    python tools/export.py --checkpoint best.pt --out exported/mine.pt --licence CC-BY-4.0

The ending of --out says what is written:

    NAME.pt2    torch.export: one self-contained program, with NAME.json (config and tree)
    NAME.onnx   the same
    NAME.pt     the network without its training, weights in half precision: a fraction of best.pt
    NAME        a folder: model.safetensors, config.json, tree.json

The last two come with a card (README.md: scores of all evaluations of the very file, classes, recipe, licence). A .pt
is taken wherever a checkpoint is, a folder by predict.py, demo.py, export.py and Predictor.load. A program is used
without this project:

    input   photos    (B, 3, H, W) uint8 RGB; any B, H and W
    output  leaves    (B, H, W) uint8 node ids
            scores    (B, N, H, W) float32, a sigmoid each

Normalisation, padding, views of --tta, and decoding with the checkpoint's root_bias are inside. Resizing is not: where
NAME.json names a short_side, resize photos to it first. A program is run once, and refused where its scores are not
PyTorch's. Needs: pip install -r requirements-export.txt (.pt2 and .pt do not).
"""

import argparse
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor, nn

from configs.config import DECODE_RULES, REPOSITORY, TTA, Config, differences
from manage import inference
from manage.checkpoint import checkpoint_digest, pack
from manage.predictor import Predictor
from manage.tables import percent, shown, to_markdown
from utils.cli import run_main
from utils.decode import leaf_bias, leaf_scores
from utils.errors import UserError
from utils.files import read_json, write_json, write_whole
from utils.hierarchy import Hierarchy

PACKAGES = {".pt2": (), ".onnx": ("onnx", "onnxruntime", "onnxscript"), ".pt": (), "": ("safetensors",)}  # by ending
OF_A_MACHINE = ("device", "num_workers", "cache", "n_val_photos")  # keys that a model does not take along
TOLERANCE = 1e-3  # of a score, between a program and PyTorch

Program = Callable[[Tensor], Sequence[Tensor]]  # photos -> leaves, scores


class Exportable(nn.Module):
    """The network with all that surrounds it in `Predictor`, as tensor operations alone."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        # kernels of channels_last would lead to a program for batches of more than one
        self.network = predictor.network.to(memory_format=torch.contiguous_format)
        self.rule, self.hierarchy = predictor.decoding.rule, predictor.hierarchy
        self.tta, mirror, device = predictor.how["tta"], predictor.how["mirror"], predictor.device
        bias = leaf_bias(predictor.decoding.biases(self.hierarchy), self.hierarchy, device, torch.float32)
        self.register_buffer("mirror", None if mirror is None else torch.tensor(mirror, device=device))
        self.register_buffer("leaf_ids", self.hierarchy.leaf_index(device).clone())
        self.register_buffer("bias", bias)
        self.requires_grad_(False)

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Shape: (B, 3, H, W) in 0..255 -> (B, H, W) uint8 node ids, (B, N, H, W) scores."""
        logits = inference.mean_of_views(self._logits, photos, photos.shape[-2:], self.tta, self.mirror)
        flat = logits.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(logits.shape[1], -1)  # (N, BHW)
        scores = leaf_scores(self.rule, flat, self.hierarchy)
        if self.bias is not None:
            scores = scores + self.bias
        leaves = self.leaf_ids.index_select(0, scores.max(0).indices).to(torch.uint8)
        return leaves.view(-1, *logits.shape[2:]), logits.sigmoid()

    def _logits(self, photos: Tensor) -> Tensor:
        """Pads as the network would, in a form whose symbolic sizes are seen to be multiples of the stride."""
        (height, width), stride = photos.shape[-2:], self.network.stride
        rows, columns = stride * ((height + stride - 1) // stride), stride * ((width + stride - 1) // stride)
        logits = self.network(F.pad(photos.float(), (0, columns - width, 0, rows - height), mode="replicate"))
        # not a slice: its symbolic size would be a minimum, which stays undecided
        return logits.narrow(-2, 0, height).narrow(-1, 0, width)


# --- programs ---
def open_program(path: Path) -> Program:
    """The program in a file: photos -> leaves, scores."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda photos: [torch.from_numpy(output) for output in session.run(None, {"photos": photos.numpy()})]


def export_program(predictor: Predictor, path: Path) -> None:
    """Writes the program and what it was made of, and runs it once. Raises: UserError, OSError."""
    warnings.filterwarnings("ignore", category=UserWarning)  # the exporters' own, about their insides
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, state = Exportable(predictor), handed_on(predictor)
    photos = torch.randint(0, 256, (2, 3, 123, 187), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with fx_config.patch(backed_size_oblivious=True):  # without it every size is taken to be other than 1
        program = torch.export.export(model, (photos,), dynamic_shapes=(any_size,), strict=False)
    if path.suffix == ".pt2":
        torch.export.save(program, buffer := io.BytesIO())
        write_whole(buffer.getvalue(), path)
    else:
        names = {"input_names": ["photos"], "output_names": ["leaves", "scores"]}
        sizes = {0: "batch", 2: "height", 3: "width"}
        made = torch.onnx.export(program, **names, dynamic_shapes=(sizes,), dynamo=True, verbose=False)
        made.save(str(path), external_data=False)
    write_json({key: state[key] for key in ("config", "tree", "origin")}, path.with_suffix(".json"))
    apart = (open_program(path)(photos)[1] - model(photos)[1]).abs().max().item()
    if not apart <= TOLERANCE:
        raise UserError(f"{path}: its scores are up to {apart:.1e} from PyTorch's; do not use it")
    print(f"wrote {path}: scores within {apart:.1e} of PyTorch's")


# --- files to hand on ---
def handed_on(predictor: Predictor) -> dict:
    """What a checkpoint needs for prediction, evaluation and `init_from`, and where it came from.

    Its config is without what is true of one machine alone: places outside the repository, and its device.
    """
    source, config, decoding = predictor.source, predictor.config, predictor.decoding
    outside = {
        key: getattr(Config, key) or Path(value).name
        for key, value in config.to_dict().items()
        if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("..", "~")))
    }
    own = {"decode": decoding.rule, "root_bias": decoding.root_bias, "tta": predictor.how["tta"]}
    starts = source.parents[1] / "environment.json"
    origin = {
        "experiment": config.exp_name,
        "checkpoint": source.name,
        "sha256": checkpoint_digest(source),
        "commit": read_json(starts)[0].get("commit") if starts.is_file() else None,
    }
    return {
        "model": {key: value.contiguous() for key, value in predictor.network.state_dict().items()},
        "ema": None,
        "config": replace(config, **outside, **{key: getattr(Config, key) for key in OF_A_MACHINE}, **own).to_dict(),
        "tree": predictor.hierarchy.to_dict(),
        "epoch": predictor.epoch,
        "origin": predictor.origin or origin,
    }


def export_model(predictor: Predictor, path: Path, licence: str) -> None:
    """Writes a checkpoint, or a folder without an ending, and its card. Raises: OSError."""
    state, scored = handed_on(predictor), path
    if path.suffix:
        # kernels alone are halved: the rest is small, and running variances could overflow
        weights = {key: value.half() if value.dim() > 1 else value for key, value in state["model"].items()}
        write_whole(pack(state | {"model": weights}), path)
    else:
        from safetensors.torch import save

        scored = predictor.source
        path.mkdir(exist_ok=True)
        write_whole(save(state["model"]), path / "model.safetensors")
        write_json(state["config"], path / "config.json")
        write_json(state["tree"], path / "tree.json")
    records = evaluations_of(scored, state["config"])
    readme = (path.parent if path.suffix else path) / "README.md"
    write_whole(card(state, records, licence), readme)
    print(f"wrote {path}, and {readme} with the scores of {len(records)} evaluations")


def evaluations_of(checkpoint: Path, config: dict) -> list[dict]:
    """The scores.json of every evaluation of this very file on the most val photos, by its own rule and views first."""
    digest, records = checkpoint_digest(checkpoint), []
    for folder in {REPOSITORY, *checkpoint.resolve().parents}:
        records += [read_json(path) for path in sorted(folder.glob("experiments/*/evaluation/*/scores.json"))]
    records = [record for record in records if record.get("checkpoint_sha256") == digest]
    records = [record for record in records if record["photos"] == max(other["photos"] for other in records)]
    own = (config["decode"], config["tta"])
    return sorted(records, key=lambda record: ((record["decode"], record["tta"]) != own, record["tta"]))


def card(state: dict, records: Sequence[dict], licence: str) -> str:
    """README.md: scores, classes, recipe, licence. A column of the table is an evaluation."""
    config, h = Config(**state["config"]), Hierarchy.from_dict(state["tree"])
    rows = [["", *(f"{record['decode']}, tta {record['tta']}" for record in records)]]
    for name in records[0]["scores"] if records else ():
        rows.append([name, *(shown(name, record["scores"].get(name)) for record in records)])
    for level, (title, nodes) in enumerate(zip(h.level_names, h.level_classes, strict=True)):
        for name in (h.names[node] for node in nodes):
            rows.append([f"{title}: {name}", *(percent(record["levels"][level]["IoU"][name]) for record in records)])
    recipe = [f"    {key}: {json.dumps(value)}" for key, (value, _) in differences(config, Config()).items()]
    template = (Path(__file__).parent / "data" / "model_card.md").read_text(encoding="utf-8")
    return template.format(
        licence=licence,
        name=config.exp_name,
        tree=h.name,
        photos=f"On {records[0]['photos']} photos" if records else "Not evaluated yet: see docs/predict.md",
        table=to_markdown(rows),
        epoch=state["epoch"],
        origin=", ".join(f"{key} {value}" for key, value in state["origin"].items()),
        recipe="\n".join(recipe),
    )


# --- the command ---
def check_out(out: Path, overwrite: bool) -> None:
    """Raises: UserError for an unknown ending, for packages that are not there, and for files that are."""
    if out.suffix not in PACKAGES:
        raise UserError(f"--out {out}: expected a name that ends in .pt2, .onnx or .pt, or a folder without an ending")
    if missing := [package for package in PACKAGES[out.suffix] if importlib.util.find_spec(package) is None]:
        raise UserError(f"--out {out} needs {', '.join(missing)}: pip install -r requirements-export.txt")
    beside = {".pt": out.with_name("README.md"), "": out}.get(out.suffix, out.with_suffix(".json"))
    if not overwrite and (there := [path for path in (out, beside) if path.exists()]):
        raise UserError(f"{there[0]} exists already; choose another --out, or give --overwrite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="F", help="a .pt file, an experiment (default: the shipped model)")
    parser.add_argument("--out", required=True, type=Path, metavar="P", help="a .pt2, .onnx or .pt file, or a folder")
    parser.add_argument("--decode", choices=DECODE_RULES, help="another rule than the checkpoint's")
    parser.add_argument("--tta", choices=TTA, help="other views than the checkpoint's")
    parser.add_argument("--licence", default="unknown", help="for the card, such as cc-by-4.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    arguments = parser.parse_args()
    out = arguments.out
    check_out(out, arguments.overwrite)
    predictor = Predictor.load(arguments.checkpoint, "cpu", decode=arguments.decode, tta=arguments.tta)
    print(f"exporting {predictor}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix in (".pt", ""):
        export_model(predictor, out, arguments.licence)
    else:
        export_program(predictor, out)


if __name__ == "__main__":
    run_main(main)
