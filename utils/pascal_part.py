"""What Pascal-Part's files hold, and how it becomes label maps of our tree. It writes nothing.

Three kinds of source: raw annotations (.mat), Pascal-Person-Part masks in the order that most human-parsing
code uses, and masks whose `classes.txt` names the labels. Labels are matched to the tree by name, never by
habit: on this tree the usual order would put arms into the lower body.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import MASK_SUFFIXES, read_labels

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
STANDARD_ORDER = dict(enumerate([BACKGROUND, "head", "torso", "up_hand", "low_hand", "up_leg", "low_leg"]))
VOID = 255  # in every mask of this data set's family
VOID_NAMES = {"void", "ignore", "unlabelled", "unlabeled"}
SAME_CLASS = {
    "bg": BACKGROUND,
    "upper_arm": "up_hand",
    "lower_arm": "low_hand",
    "upper_leg": "up_leg",
    "lower_leg": "low_leg",
}

FORMATS = ("raw", "person-part", "project")
RAW_FOLDER = "Annotations_Part"
MASK_FOLDERS = ("gt_masks", "pascal_person_part_gt", "SegmentationPart", "SegmentationClassPart")
PHOTO_FOLDER = "JPEGImages"
SEARCH_DEPTH = 4


class LeftOut(Exception):
    """A photo that is no part of the data set, by its rules and not by a fault; the message says why."""


# ---- from an annotation to labels --------------------------------------------------------------------------


def read_annotation(path: Path) -> Any:
    """The `anno` struct of a raw annotation.

    Raises: UserError where scipy is missing, or the file is damaged or holds no `anno`.
    """
    loadmat = _import_loadmat()
    try:
        content = loadmat(path, struct_as_record=False, squeeze_me=True, variable_names=["anno"])
    except Exception as error:  # scipy raises nearly every type on damaged files
        raise UserError(f"the annotation {path} cannot be read, it may be damaged: {error}") from error
    if "anno" not in content:
        raise UserError(f"the annotation {path} has no variable 'anno'; is it a Pascal-Part file?")
    return content["anno"]


def _import_loadmat() -> Callable[..., dict[str, Any]]:
    """Imported late: no other tool and no other format needs scipy."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            "scipy is missing; it reads the raw .mat annotations. Install it with: "
            "pip install -r requirements-tools.txt"
        ) from None
    return loadmat


def has_person(anno: Any) -> bool:
    """Whether any object of the annotation is a person. Raises: UserError where a field is missing."""
    return any(_is_person(thing) for thing in _structs(anno, "objects"))


def paint(anno: Any, id_of_class: dict[str, int]) -> np.ndarray | None:
    """The label map of an annotation, or None where no part is annotated.

    Every part of every object, in order, paints over what is there: a person's its class, any other's
    background. Whole-object masks are not used.

    Shape: (H, W), uint8.
    Raises: UserError for an unknown part of a person, part masks of different sizes, missing fields.
    """
    labels = None
    for thing in _structs(anno, "objects"):
        is_person = _is_person(thing)
        for part in _structs(thing, "parts"):
            name = str(_field(part, "part_name"))
            if is_person and name not in CLASS_OF_PART:
                close = difflib.get_close_matches(name, CLASS_OF_PART, n=1)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise UserError(f"unknown part {name!r} of a person{hint}; known parts: {', '.join(CLASS_OF_PART)}")
            mask = np.asarray(_field(part, "mask"))
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
    return labels


def _is_person(thing: Any) -> bool:
    return str(_field(thing, "class")) == "person"


def _structs(struct: Any, name: str) -> Iterable[Any]:
    # loadmat squeezes: one struct stands alone, none is an empty array, several are an array
    return np.atleast_1d(_field(struct, name))


def _field(struct: Any, name: str) -> Any:
    if not hasattr(struct, "_fieldnames") or name not in struct._fieldnames:
        raise UserError(f"the annotation lacks the field '{name}' where Pascal-Part has one")
    return getattr(struct, name)


# ---- from other label orders to ours -----------------------------------------------------------------------


def read_classes(path: Path, names: Sequence[str]) -> dict[int, str]:
    """The order that a `classes.txt` states: label -> name in the tree (`names`), or "void".

    A line is `id: name`, or all lines are plain names that count from 0.

    Raises: UserError naming the line that has no known name, or repeats an id or a name.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    order: dict[int, str] = {}
    for number, line in enumerate(filter(None, lines)):
        match = re.fullmatch(r"(\d+)\s*[:=,;\s]\s*(.+)", line)
        label, text = (int(match[1]), match[2]) if match else (number, line)
        if not match and list(order) != list(range(number)):
            raise UserError(f"{path}: {line!r} has no id, other lines have; write every line as 'id: name'")
        name = _name_in_tree(text, names, f"{path}: {line!r}")
        if label > VOID or label in order or name in order.values():
            raise UserError(f"{path}: {line!r} repeats an id or a class, or the id is above {VOID}")
        order[label] = name
    if not order:
        raise UserError(f"{path} is empty; expected lines such as '0: background'")
    return order


def relabel_table(order: dict[int, str], h: Hierarchy) -> np.ndarray:
    """Label in the source -> node id of the tree, -1 where the source's order has no such label.

    Shape: (256,), int16.
    """
    table = np.full(256, -1, np.int16)
    table[VOID] = h.ignore_index
    for label, name in order.items():
        table[label] = h.ignore_index if name == "void" else h.names.index(name)
    return table


def relabel(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Labels in the tree's ids. Shape: (H, W) uint8 -> (H, W) uint8. Raises: UserError for unknown labels."""
    nodes = table[labels]
    if (nodes < 0).any():
        values, counts = np.unique(labels[nodes < 0], return_counts=True)
        found = ", ".join(f"{value} ({count} pixels)" for value, count in zip(values, counts, strict=True))
        known = ", ".join(map(str, np.flatnonzero(table >= 0)))
        raise UserError(f"the mask has labels that its class list lacks: {found}; known: {known}")
    return nodes.astype(np.uint8)


def _name_in_tree(text: str, names: Sequence[str], where: str) -> str:
    name = re.sub(r"[\s_-]+", "_", text.strip().lower())
    for candidate in (name, name.removesuffix("s")):
        candidate = SAME_CLASS.get(candidate, candidate)
        if candidate in names:
            return candidate
        if candidate in VOID_NAMES:
            return "void"
    close = difflib.get_close_matches(name, [*names, *SAME_CLASS], n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise UserError(f"{where} names no class of the tree{hint}; known names: {', '.join([*names, *SAME_CLASS])}")


# ---- finding the files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where the files of a data set are, and what its labels mean (`order` is None for raw annotations)."""

    format: str
    annotations: Path
    photos: Path
    order: dict[int, str] | None

    def files(self) -> dict[str, list[Path]]:
        """The annotation files of each id, sorted by id; a second file for an id is a fault."""
        suffixes = (".mat",) if self.format == "raw" else MASK_SUFFIXES
        files: dict[str, list[Path]] = {}
        for path in sorted(self.annotations.iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                files.setdefault(path.stem, []).append(path)
        return files

    def read(self, path: Path, h: Hierarchy) -> np.ndarray:
        """The label map of one annotation file, in node ids of the tree. Shape: (H, W), uint8.

        Raises: LeftOut for a raw annotation without a person's part; UserError for what cannot be used.
        """
        if self.format != "raw":
            return relabel(read_labels(path), relabel_table(self.order, h))
        anno = read_annotation(path)
        if not has_person(anno):
            raise LeftOut("no person")
        id_of_class = {name: v for v, name in enumerate(h.names)}
        labels = paint(anno, id_of_class)
        if labels is None or (labels == id_of_class[BACKGROUND]).all():
            raise LeftOut("a person, but no visible part")
        return labels


@dataclass(frozen=True)
class Request:
    """What the user said about the source; None is for us to find out."""

    root: Path | None = None
    annotations: Path | None = None
    photos: Path | None = None
    format: str | None = None
    order: str | None = None
    out: Path | None = None  # never searched: what this tool wrote is no source


def find_source(request: Request, h: Hierarchy) -> Source:
    """The source under `root`, or in the folders that are given one by one.

    Raises: UserError where a folder is missing, several could be meant, or the order of labels is not known.
    """
    root, annotations, photos, format = request.root, request.annotations, request.photos, request.format
    for folder in filter(None, (root, annotations, photos)):
        if not folder.is_dir():
            raise UserError(f"the folder {folder} does not exist; unpack the archives and name that folder")
    if root is None and not (annotations and photos):
        raise UserError("say where the data is: a SOURCE folder, or --annotations D and --photos D")
    annotations = annotations or _find_annotations(request, h)
    if photos is None:
        photos = _only(_folders_named(root, (PHOTO_FOLDER,), request.out), "photos", root, "--photos")
    annotations, photos = annotations.resolve(), photos.resolve()

    if _holds(annotations, (".mat",)) and format in (None, "raw"):
        _import_loadmat()  # before anything is written
        return Source("raw", annotations, photos, None)
    if format == "raw" or not _holds(annotations, MASK_SUFFIXES):
        wanted = ".mat annotations" if format == "raw" else ".mat, .png or .npy annotations"
        raise UserError(f"the folder {annotations} holds no {wanted}; name the right one with --annotations")
    order = _order_of(annotations, request, h)
    if order is None:
        raise UserError(
            f"nothing says what the labels in {annotations} mean. Put a classes.txt (lines such as '1: head') "
            f"beside them, or say --order standard ({_in_words(STANDARD_ORDER)}) or --order project "
            f"({_in_words(_project_order(h))})"
        )
    is_standard = without_void(order) == STANDARD_ORDER
    if format == "person-part" and not is_standard:
        raise UserError(
            f"--format person-part means {_in_words(STANDARD_ORDER)}, but the labels in {annotations} are "
            f"{_in_words(order)}; leave --format out"
        )
    return Source(format or ("person-part" if is_standard else "project"), annotations, photos, order)


def _order_of(folder: Path, request: Request, h: Hierarchy) -> dict[int, str] | None:
    """The order that classes.txt states or the user claims: one is enough, two must agree."""
    places = [folder, folder.parent, *([request.root] if request.root else [])]
    path = next((place / "classes.txt" for place in places if (place / "classes.txt").is_file()), None)
    stated = read_classes(path, h.names) if path else None
    claimed = {"standard": STANDARD_ORDER, "project": _project_order(h), None: None}[request.order]
    if stated and claimed and without_void(stated) != claimed:
        raise UserError(
            f"--order {request.order} means {_in_words(claimed)}, but {path} says {_in_words(stated)}; leave "
            "--order out, or correct the file"
        )
    return stated or claimed


def _project_order(h: Hierarchy) -> dict[int, str]:
    return {leaf: h.names[leaf] for leaf in h.leaves}


def without_void(order: dict[int, str]) -> dict[int, str]:
    return {label: name for label, name in order.items() if name != "void"}


def _in_words(order: dict[int, str]) -> str:
    return ", ".join(f"{label} {name}" for label, name in sorted(order.items()))


def _find_annotations(request: Request, h: Hierarchy) -> Path:
    root = request.root
    raw = [root] if _holds(root, (".mat",)) else _folders_named(root, (RAW_FOLDER,), request.out)
    masks = _folders_named(root, MASK_FOLDERS, request.out) or ([root] if _holds(root, MASK_SUFFIXES) else [])
    if request.format is None and raw:  # masks that nothing explains are no rival to annotations
        masks = [folder for folder in masks if _order_of(folder, request, h)]
    found = {"raw": raw, "person-part": masks, "project": masks, None: raw + masks}[request.format]
    return _only(found, "annotations", root, "--annotations (or choose by --format)")


def _only(found: list[Path], what: str, root: Path, option: str) -> Path:
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"several folders could be the {what}: {', '.join(map(str, found))}; name one with {option}")
    names = PHOTO_FOLDER if what == "photos" else f"{RAW_FOLDER} or {', '.join(MASK_FOLDERS)}"
    raise UserError(
        f"no {what} in {root}: looked for folders named {names}, {SEARCH_DEPTH} levels deep; name it with {option}"
    )


def _folders_named(root: Path, names: Sequence[str], out: Path | None) -> list[Path]:
    """Folders of these names under (or equal to) `root`, in order, not looking into what this tool wrote."""
    if root.name in names:
        return [root]
    found = []
    for folder, children, _ in os.walk(root):
        here = Path(folder)
        children[:] = sorted(name for name in children if not _is_output(here / name, out))
        found += [here / name for name in children if name in names]
        too_deep = len(here.relative_to(root).parts) >= SEARCH_DEPTH - 1
        children[:] = [] if too_deep else [name for name in children if name not in names]
    return found


def _is_output(folder: Path, out: Path | None) -> bool:
    if out is None or folder.resolve().parent != out.resolve().parent:
        return False
    return re.fullmatch(re.escape(out.name) + r"(\.old\d+)?", folder.name) is not None


def _holds(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(path.suffix.lower() in suffixes for path in folder.iterdir())
