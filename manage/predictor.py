"""From a checkpoint to label maps of any photo.

predictor = Predictor.load()                    # the shipped model; or a checkpoint, an experiment, a folder of export
result = predictor(Image.open("photo.jpg"))     # .levels .leaves .scores .shares
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.config import DECODE_RULES, REPOSITORY, Config
from manage import distributed
from manage.checkpoint import find_model, load_checkpoint
from manage.inference import EXACT, SCALES, SMALLEST_TILE, logit_rows
from manage.network import restore_network
from models.hseg import HSEG
from utils.decode import DECODERS
from utils.errors import UserError
from utils.files import read_json
from utils.hierarchy import Hierarchy
from utils.images import read_photo, scaled_size, upright_rgb

SHIPPED = REPOSITORY / "models" / "pretrained" / "pascal_part.pt"  # used where no checkpoint is named


@dataclass(frozen=True)
class Decoding:
    """The rule from scores to a leaf, and the offset of each root, by name. Of a checkpoint: see `of`."""

    rule: str
    root_bias: dict[str, float]

    @classmethod
    def of(cls, trained_with: Config, rule: str | None = None, root_bias: dict | None = None) -> "Decoding":
        """The checkpoint's own rule and offset, where the user names no other; the offset is for its own rule alone."""
        own = trained_with.decode_rule
        rule = own if rule in (None, "auto") else rule
        if rule not in DECODERS:
            raise UserError(f"decode {rule!r} is no decoding rule; expected one of {', '.join(DECODE_RULES)}")
        if root_bias is None:
            root_bias = trained_with.root_bias if rule == own else {}
        return cls(rule, root_bias)

    def __call__(self, logits: Tensor, h: Hierarchy) -> Tensor:
        """Shape: (B, N, H, W) -> (B, H, W) leaf ids."""
        return DECODERS[self.rule](logits, h, self.biases(h))

    def biases(self, h: Hierarchy) -> list[float] | None:
        """One offset for each root, in the tree's order. Raises: UserError for a name that is no root."""
        names = [h.names[root] for root in h.roots]
        for name in self.root_bias:
            if name not in names:
                raise UserError(f"key 'root_bias': {name!r} is no root of the tree; its roots are {', '.join(names)}")
        return [self.root_bias.get(name, 0.0) for name in names] if self.root_bias else None

    def __str__(self) -> str:
        return self.rule + (f" with root_bias {self.root_bias}" if self.root_bias else "")


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, or a folder that tools/export.py wrote. Raises: UserError."""
    if not path.is_dir():
        return load_checkpoint(path)
    try:
        from safetensors.torch import load_file

        weights = load_file(path / "model.safetensors")
    except Exception as error:  # the package raises its own kinds
        advice = "pip install -r requirements-export.txt, or copy the folder again"
        raise UserError(f"{path / 'model.safetensors'} cannot be read ({error}); {advice}") from None
    return {"model": weights, "config": read_json(path / "config.json"), "tree": read_json(path / "tree.json")}


@dataclass
class Result:
    """What the network says of one photo, at the photo's own upright size."""

    photo: Image.Image  # upright RGB, at its own size
    leaves: np.ndarray  # (H, W) uint8 node ids
    logits: Tensor | None  # (N, H, W), where they were asked for
    hierarchy: Hierarchy

    @cached_property
    def levels(self) -> list[np.ndarray]:
        """The label map of each level, leaves first. Shape: L times (H, W) uint8 node ids."""
        return [self.hierarchy.level_of(self.leaves, level) for level in range(self.hierarchy.num_levels)]

    @cached_property
    def scores(self) -> np.ndarray:
        """Score of every node. Shape: (N, H, W) in [0, 1], float32, of a very large photo float16."""
        return self.logits.sigmoid().cpu().numpy()

    @cached_property
    def shares(self) -> dict[str, float]:
        """Node name -> share of the photo's pixels; a node has those of its leaves, so the roots add up to 1."""
        h = self.hierarchy
        pixels = np.bincount(self.leaves.ravel(), minlength=h.num_nodes)
        totals = np.zeros(h.num_nodes, dtype=np.int64)
        for leaf in h.leaves:
            totals[list(h.paths[leaf])] += pixels[leaf]
        return {name: float(total / self.leaves.size) for name, total in zip(h.names, totals, strict=True)}


class Predictor:
    """A network with its tree and decoding, called with a photo. Whatever is not named is the checkpoint's own.

    Raises: UserError for a rule, an offset, views or windows that cannot be.
    """

    def __init__(
        self,
        network: HSEG,
        config: Config,
        hierarchy: Hierarchy,
        decode: str | None = None,
        root_bias: dict[str, float] | None = None,
        tta: str | None = None,
        tile: int | None = None,
    ) -> None:
        self.network, self.config, self.hierarchy = network.eval(), config, hierarchy
        self.source, self.epoch, self.origin = None, 0, None  # the file it is of, and what that says of itself
        self.decoding, self.device = Decoding.of(config, decode, root_bias), next(network.parameters()).device
        self.decoding.biases(hierarchy)
        tta = tta or config.tta
        if tta not in SCALES:
            raise UserError(f"tta {tta!r}: expected one of {', '.join(SCALES)}")
        if tile is not None and tile < SMALLEST_TILE:
            raise UserError(f"tile {tile}: expected at least {SMALLEST_TILE} pixels, the side of a window")
        if tta != "off":
            hierarchy.check_sides("the checkpoint's tree", "leave out tta")
        amp = config.amp if self.device.type == "cuda" else "off"
        self.how = {"amp": amp, "tta": tta, "tile": tile, "mirror": hierarchy.mirror}  # `logit_rows` is told

    @classmethod
    def load(cls, checkpoint: str | Path | None = None, device: str = "auto", **options) -> "Predictor":
        """A predictor from a checkpoint, an experiment or an exported folder; None: the shipped model.

        Raises: UserError for a checkpoint, device or option that cannot be used.
        """
        where = distributed.choose_device(device)
        path = SHIPPED if checkpoint is None else find_model(str(checkpoint), REPOSITORY)
        state = load_state(path)
        config, hierarchy, network = restore_network(state, str(path))
        network = network.to(where, memory_format=torch.channels_last)  # on a CPU a fifth faster
        predictor = cls(network, config, hierarchy, **options)
        predictor.source, predictor.epoch, predictor.origin = path, state.get("epoch", 0), state.get("origin")
        return predictor

    def __call__(self, photo: Image.Image | str | Path, keep_logits: bool = True) -> Result:
        """Predicts a photo of any mode and size; a file is read exactly as evaluate.py reads it.

        Raises: UserError for a file that cannot be read, ValueError for mode F, whose pixels have no known range.
        """
        is_open, side = isinstance(photo, Image.Image), self.config.short_side
        whole = fed = upright_rgb(photo) if is_open else read_photo(photo)
        if side is not None:  # a JPEG decodes smaller at once
            size = scaled_size(whole.size, side)
            fed = whole.resize(size, Image.Resampling.BILINEAR) if is_open else read_photo(photo, side)
        image = torch.from_numpy(np.array(fed)).permute(2, 0, 1).to(self.device)
        leaves, kept = np.empty(whole.size[::-1], np.uint8), None
        if keep_logits:
            shape = (self.hierarchy.num_nodes, *leaves.shape)
            kept = torch.empty(shape, dtype=torch.float32 if math.prod(shape) <= EXACT else torch.float16)
        for rows, logits in logit_rows(self.network, image, leaves.shape, **self.how):
            leaves[rows] = self.decoding(logits, self.hierarchy)[0].cpu().numpy()
            if keep_logits:
                kept[:, rows] = logits[0]
        return Result(whole, leaves, kept, self.hierarchy)

    predict_file = __call__  # by a name that says what it is given

    def __str__(self) -> str:
        tta = "" if self.how["tta"] == "off" else f", tta {self.how['tta']}"
        return f"{self.source or self.config.exp_name}, decoded by {self.decoding}{tta}"
