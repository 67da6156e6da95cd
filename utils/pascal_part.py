"""Pascal-Part as it can be had (raw .mat annotations, or masks), and how it becomes label maps of our tree."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.classes import ALIASES, VOID, read_classes
from utils.encoder import mask_reader
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import files_below, same_form
from utils.images import MASK_SUFFIXES

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
# What most human-parsing code means by the labels 0 to 6: on our tree this order would put arms into the lower body.
STANDARD_ORDER = (BACKGROUND, "head", "torso", "up_hand", "low_hand", "up_leg", "low_leg")
NAMES = {"upper_arm": "up_hand", "lower_arm": "low_hand", "upper_leg": "up_leg", "lower_leg": "low_leg"} | ALIASES


SUFFIXES = {"raw": (".mat",), "masks": MASK_SUFFIXES}
FOLDERS = {
    "raw": ("Annotations_Part",),
    "masks": ("gt_masks", "pascal_person_part_gt", "SegmentationPart", "SegmentationClassPart"),
    "photos": ("JPEGImages",),
}


class LeftOut(Exception):
    """A photo that is no part of the data set, by its rules and not by a fault; the message says why."""


def read_annotation(path: Path) -> Any:
    """The `anno` struct of a raw annotation.

    Raises: UserError where scipy is missing, or the file is damaged or holds no `anno`.
    """
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


def paint(anno: Any, id_of_class: dict[str, int]) -> np.ndarray:
    """The label map of an annotation.

    Every part of every object, in order, paints over what is there: a person's its class, any other's
    background. Whole-object masks are not used.

    Shape: (H, W), uint8.
    Raises: LeftOut where no part of a person is seen; UserError for an unknown part of a person, part masks of
    different sizes, missing fields.
    """
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


# ---- where it lies ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where the files of a data set are, and which class each value of its masks is (None: raw annotations)."""

    annotations: Path
    photos: Path
    classes: dict[str, str] | None

    @property
    def kind(self) -> str:
        return "raw" if self.classes is None else "masks"

    def files(self) -> dict[str, list[Path]]:
        """The annotation files of each id, sorted by id; a second file for an id is a fault."""
        files: dict[str, list[Path]] = {}
        for path in files_below(self.annotations, SUFFIXES[self.kind]):
            files.setdefault(same_form(path.stem), []).append(path)
        return files

    def read(self, path: Path, h: Hierarchy) -> np.ndarray:
        """The label map of one annotation file, in node ids of the tree. Shape: (H, W), uint8.

        Raises: LeftOut for a raw annotation without a person's part; UserError for what cannot be used.
        """
        if self.classes is None:
            return paint(read_annotation(path), {name: v for v, name in enumerate(h.names)})
        return mask_reader(h, self.classes, by="index").read(path)[0]


def find_source(args: argparse.Namespace, h: Hierarchy) -> Source:
    """The source under `args.source`, or in the folders that are given one by one.

    Raises: UserError where a folder is missing, several could be meant, or the order of labels is not known.
    """
    root, annotations, photos = args.source, args.annotations, args.photos
    for folder in filter(None, (root, annotations, photos)):
        if not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist; unpack the archives and name that folder")
    if root is None and not (annotations and photos):
        raise UserError("say where the data is: a SOURCE folder, or --annotations D and --photos D")
    if annotations is None:
        raw, masks = _folders(root, "raw", args.out), _folders(root, "masks", args.out)
        if raw:  # masks that nothing explains are no rival to annotations
            masks = [folder for folder in masks if classes_of(folder, args, h)]
        annotations = _only(raw + masks, ("raw", "masks"), root, "--annotations and --photos")
    photos = photos or _only(_folders(root, "photos", args.out), ("photos",), root, "--photos")
    annotations, photos = annotations.resolve(), photos.resolve()

    if _holds(annotations, SUFFIXES["raw"]):
        import_loadmat()  # before anything is written
        return Source(annotations, photos, None)
    if not _holds(annotations, MASK_SUFFIXES):
        raise UserError(f"{annotations} holds no .mat, .png or .npy; name the right folder with --annotations")
    classes = classes_of(annotations, args, h)
    if classes is None:
        raise UserError(
            f"nothing says what the labels in {annotations} mean. Put a classes.txt (lines such as '1: head') beside "
            f"them, or say --order standard ({_words(order_of('standard', h))}) or --order project "
            f"({_words(order_of('project', h))})"
        )
    return Source(annotations, photos, classes)


def classes_of(folder: Path, args: argparse.Namespace, h: Hierarchy) -> dict[str, str] | None:
    """The order that classes.txt states or the user claims: one is enough, two must agree."""
    places = [folder, folder.parent, *([args.source] if args.source else [])]
    path = next((place / "classes.txt" for place in places if (place / "classes.txt").is_file()), None)
    stated = read_classes(path, h.names, NAMES) if path else None
    claimed = order_of(args.order, h) if args.order else None
    if stated and claimed and {value: name for value, name in stated.items() if name != VOID} != claimed:
        raise UserError(
            f"--order {args.order} means {_words(claimed)}, but {path} says {_words(stated)}; leave --order out, or "
            "correct the file"
        )
    return stated or claimed


def order_of(which: str, h: Hierarchy) -> dict[str, str]:
    if which == "standard":
        return {str(label): name for label, name in enumerate(STANDARD_ORDER)}
    return {str(leaf): h.names[leaf] for leaf in h.leaves}


def _words(classes: dict[str, str]) -> str:
    return ", ".join(f"{value} {name}" for value, name in classes.items())


def _only(found: list[Path], kinds: tuple[str, ...], root: Path, option: str) -> Path:
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"several folders could be meant: {', '.join(map(str, found))}; choose by {option}")
    names = ", ".join(name for kind in kinds for name in FOLDERS[kind])
    raise UserError(f"no folder named {names} in {root} or below; give it by {option}")


def _folders(root: Path, kind: str, out: Path) -> list[Path]:
    """Folders of that kind under (or equal to) `root`, in order, not looking into what this tool wrote."""
    if root.name in FOLDERS[kind]:
        return [root]
    found = [path for name in FOLDERS[kind] for path in sorted(root.rglob(name)) if not _is_made(path.resolve(), out)]
    return found or ([root] if kind != "photos" and _holds(root, SUFFIXES[kind]) else [])


def _is_made(path: Path, out: Path) -> bool:
    names = [folder.name for folder in (path, *path.parents) if folder.parent == out.resolve().parent]
    return any(name == out.name or name.startswith(f"{out.name}.old-") for name in names)


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.iterdir())
