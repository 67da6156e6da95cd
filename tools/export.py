"""Exports a checkpoint as one self-contained program: photos in, label maps and scores out.

    python tools/export.py --checkpoint best.pt --out exported
    python tools/export.py --checkpoint best.pt --out exported --format torch,onnx --check data/pascal_part/JPEGImages

It writes model.pt2 (torch.export), model.onnx, and model.json (the tree, the rule, and what the input must be).

    input   photos    (B, 3, H, W) RGB 0..255, uint8 or with --dtype float32 float; any B, H and W
    output  leaves    (B, H, W) uint8 node ids
            scores    (B, N, H, W) float32 in [0, 1]

Normalisation, padding to the network's stride, and decoding with the checkpoint's root_bias are inside. Resizing is
not: where model.json names a short_side, resize photos to it first. --check compares the label maps of real photos
with PyTorch's and fails where fewer than 99.99 % of pixels agree.

ONNX needs three more packages: pip install -r requirements-export.txt
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor, nn

from configs.config import DECODE_RULES
from manage.predictor import Predictor
from utils.cli import progress, run_main
from utils.decode import leaf_bias, leaf_scores
from utils.errors import UserError
from utils.files import write_json
from utils.images import PHOTO_SUFFIXES, read_photo

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LEAST_AGREEMENT = 0.9999

Program = Callable[[Tensor], Tensor]  # photos -> leaves


class Exportable(nn.Module):
    """The network with all that surrounds it in `Predictor`, as tensor operations alone."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network, self.rule, self.hierarchy = predictor.network, predictor.decoding.rule, predictor.hierarchy
        self.register_buffer("leaf_ids", self.hierarchy.leaf_index(predictor.device).clone())
        self.register_buffer(
            "bias",
            leaf_bias(predictor.decoding.biases(self.hierarchy), self.hierarchy, predictor.device, torch.float32),
        )
        self.requires_grad_(False)

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Shape: (B, 3, H, W) in 0..255 -> (B, H, W) uint8 node ids, (B, N, H, W) scores."""
        height, width = photos.shape[-2:]
        logits = self.network(_to_multiple(photos.float(), self.network.stride))
        flat = logits.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(logits.shape[1], -1)  # (N, BHW)
        scores = leaf_scores(self.rule, flat, self.hierarchy)
        if self.bias is not None:
            scores = scores + self.bias
        leaves = self.leaf_ids.index_select(0, scores.max(0).indices).to(torch.uint8).view(-1, *logits.shape[2:])
        return _cut(leaves, height, width), _cut(logits.sigmoid(), height, width)


def _cut(maps: Tensor, height: int, width: int) -> Tensor:
    """The padding taken off. Not a slice: its symbolic size would be a minimum, which stays undecided."""
    return maps.narrow(-2, 0, height).narrow(-1, 0, width)


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
        photo = predictor.fed(read_photo(path))  # at the checkpoint's short_side
        expected = torch.from_numpy(predictor.predict_as_is(photo).leaves)
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].contiguous()
        same += int((program(image.to(dtype))[0] == expected).sum())
        total += expected.numel()
    return same / total


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="F", help="a .pt file written by train.py")
    parser.add_argument("--out", required=True, type=Path, metavar="D", help="folder for the exported files")
    parser.add_argument("--format", default="torch,onnx", metavar="A,B", help="torch, onnx or both (default)")
    parser.add_argument("--dtype", default="uint8", choices=("uint8", "float32"), help="of the input photos")
    parser.add_argument("--decode", choices=DECODE_RULES, help="another rule than the checkpoint's")
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
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if "onnx" in formats and missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt, or give --format torch"
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
        "tree": predictor.hierarchy.to_dict(),
    }


def main() -> int:
    arguments = read_arguments()
    formats = check_arguments(arguments)
    photos = photos_in(arguments.check, arguments.check_photos) if arguments.check else []
    predictor = Predictor.load(arguments.checkpoint, "cpu", decode=arguments.decode)
    if predictor.hierarchy.num_nodes > 256:
        raise UserError(f"the tree has {predictor.hierarchy.num_nodes} nodes; label maps of one byte hold 256")
    dtype = getattr(torch, arguments.dtype)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(description(predictor, arguments.dtype), arguments.out / "model.json")
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written ({error.strerror})") from None
    warnings.filterwarnings("ignore", category=UserWarning)  # the exporters' own, about their insides
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = export_torch(Exportable(predictor), dtype)
    worst = 1.0
    for name in formats:
        path = arguments.out / FORMATS[name]
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
        worst = min(worst, share)
    if worst < LEAST_AGREEMENT:
        print(
            f"error: less than {100 * LEAST_AGREEMENT} % of the pixels agree; do not use this export", file=sys.stderr
        )
    return int(worst < LEAST_AGREEMENT)


if __name__ == "__main__":
    run_main(main)
