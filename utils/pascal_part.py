"""Raw Pascal-Part annotations (.mat) -> label maps of our tree."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

BACKGROUND = "background"
PARTS_OF_CLASS = {  # the neck belongs to the head in this data set
    "head": "head leye reye lear rear lebrow rebrow nose mouth hair neck",
    "torso": "torso",
    "up_hand": "luarm ruarm",
    "low_hand": "llarm rlarm lhand rhand",
    "up_leg": "luleg ruleg",
    "low_leg": "llleg rlleg lfoot rfoot",
}
CLASS_OF_PART = {part: name for name, parts in PARTS_OF_CLASS.items() for part in parts.split()}


class LeftOut(Exception):
    """A photo that is no part of the data set, by its rules and not by a fault; the message says why."""


def _read_mat(path: Path) -> Any:
    loadmat = import_loadmat()
    try:
        content = loadmat(path, struct_as_record=False, squeeze_me=True, variable_names=["anno"])
    except Exception as error:  # scipy raises nearly every type on damaged files
        raise UserError(f"the annotation {path} cannot be read, it may be damaged: {error}") from error
    if "anno" not in content:
        raise UserError(f"the annotation {path} has no variable 'anno'; is it a Pascal-Part file?")
    return content["anno"]


def import_loadmat() -> Callable[..., dict[str, Any]]:
    """Imported late: nothing else needs scipy. Raises: UserError where it is missing."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            "scipy is missing; it reads the raw .mat annotations. Install it with: "
            "pip install -r requirements-tools.txt"
        ) from None
    return loadmat


def read_annotated(path: Path, id_of_class: dict[str, int]) -> np.ndarray:
    """The label map of a raw annotation.

    Every part of every object, in order, paints over what is there: a person's its class, any other's
    background. Whole-object masks are not used.

    Shape: (H, W), uint8.
    Raises: LeftOut where no part of a person is seen; UserError for an unknown part of a person, part masks of
    different sizes, missing fields, a damaged file.
    """
    anno = _read_mat(path)
    things = [(str(_field(thing, "class")) == "person", thing) for thing in _structs(anno, "objects")]
    if not any(is_person for is_person, _ in things):
        raise LeftOut("no person")
    labels = None
    for is_person, thing in things:
        for part in _structs(thing, "parts"):
            name, mask = str(_field(part, "part_name")), np.asarray(_field(part, "mask"))
            if is_person and name not in CLASS_OF_PART:
                close = difflib.get_close_matches(name, CLASS_OF_PART, n=1)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise UserError(f"unknown part {name!r} of a person{hint}; known parts: {', '.join(CLASS_OF_PART)}")
            if mask.ndim != 2 or mask.dtype.kind not in "buif":
                raise UserError(f"the mask of part {name!r} has shape {mask.shape}; expected (height, width)")
            if labels is None:
                labels = np.full(mask.shape, id_of_class[BACKGROUND], np.uint8)
            if mask.shape != labels.shape:
                raise UserError(
                    f"the mask of part {name!r} is {mask.shape[1]}x{mask.shape[0]}, an earlier one is "
                    f"{labels.shape[1]}x{labels.shape[0]}"
                )
            labels[mask != 0] = id_of_class[CLASS_OF_PART[name] if is_person else BACKGROUND]
    if labels is None or (labels == id_of_class[BACKGROUND]).all():
        raise LeftOut("a person, but no visible part")
    return labels


def _structs(struct: Any, name: str) -> Iterable[Any]:
    # loadmat squeezes: one struct stands alone, none is an empty array, several are an array
    return np.atleast_1d(_field(struct, name))


def _field(struct: Any, name: str) -> Any:
    if not hasattr(struct, "_fieldnames") or name not in struct._fieldnames:
        raise UserError(f"the annotation lacks the field '{name}' where Pascal-Part has one")
    return getattr(struct, name)
