"""Feeds mutated configs, trees, id lists, masks, photos, encodings and checkpoints to the code that reads them.

    python -m tests.fuzz --cases 100000 --seed 1
    python -m tests.fuzz --only photo --seed 1 --first 4711 --cases 1     # one case again

Each case must end in success or in a `UserError` that names the culprit: never in another exception, a hang, or
output that is half there. A case is made from (seed, number) alone.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from configs.config import Config, load_config
from manage.checkpoint import load_checkpoint, pack
from manage.data import check_data, train_loader, val_loader
from manage.network import check_same_network, load_hierarchy, restore_network
from manage.train_manager import TrainManager
from tests.factory import TREE, make_data, write_config
from utils.dataset import Draw, Files, TrainPhotos, WholePhotos, find_samples
from utils.decode import DECODERS
from utils.encoding import encode_folder, load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.images import read_ids
from utils.losses import build_criterion
from utils.metrics import LevelScores
from utils.schedules import lr_factor
from utils.transforms import RandomView

SECONDS = 60  # after which a case hangs
WORDS = ["", " ", "x", ".", "..", "../x", "a/b", "/", "/dev/null", "~", "~nobody/x", "C:\\x", "\0", "\n", "\ud800", "é"]
WORDS += ["x" * 300, "x/" * 600, "nan", "null", "true", "cuda:9", "cuda:", "max x", "max mIoU9", "bce", "resnet99", "0"]
NUMBERS = [0, 1, -1, 2, 33, 255, 256, 65536, 2**31, 2**53, 2**63, 10**30, 10**400, -(10**400)]
NUMBERS += [0.0, 0.5, -0.5, 1.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
OTHERS = [
    None,
    True,
    False,
    [],
    [[]],
    [0],
    ["a"],
    [None],
    [1e308] * 5,
    {},
    {"a": 1},
    {"bce": -1},
    {"bce": 1.0},
    {"": {}},
]


class Hang(BaseException):
    """A case took too long."""


class PartialOutput(Exception):
    """A refused case left files behind."""


@dataclass
class Case:
    """What is tried, and the words of which a refusal must hold one."""

    action: Callable[[], None]
    culprits: list[str]
    description: str


# --- mutations ---
def mutated_json(value, chance: random.Random, rounds: int = 3):
    """A copy with some places deleted, renamed, replaced, repeated or moved; and the keys that were touched."""
    value, touched = copy.deepcopy(value), []
    for _ in range(chance.randint(1, rounds)):
        places = list(_places(value))
        if not places:
            break
        container, key = chance.choice(places)
        touched.append(str(key))
        _mutate_place(container, key, chance, touched, places)
    return value, touched


def _places(value):
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _mutate_place(container, key, chance: random.Random, touched: list[str], places: list) -> None:
    action = chance.randrange(8)
    value = container[key]
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        name = _misspelt(str(key), chance)
        touched.append(name)
        container[name] = container.pop(key)
    elif action == 2:
        other, place = chance.choice(places)
        with contextlib.suppress(KeyError, IndexError):  # that place may be gone by now
            container[key] = copy.deepcopy(other[place])
    elif action == 3:
        container[key] = [value]
    elif action == 4 and isinstance(value, int | float) and abs(value) < 2**53:
        container[key] = chance.choice([-value, value + 1, value - 1, value * 1000, value / 3, str(value)])
    elif action == 5 and isinstance(container, list):
        container.insert(key, copy.deepcopy(value))
    else:
        container[key] = copy.deepcopy(chance.choice(chance.choice([WORDS, NUMBERS, OTHERS])))


def _misspelt(word: str, chance: random.Random) -> str:
    if not word:
        return "x"
    i = chance.randrange(len(word))
    return chance.choice([word[:i] + word[i + 1 :], word.upper(), word + "s", word[:i] + "_" + word[i:], " " + word])


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """A copy with bits flipped, and pieces cut, doubled, zeroed, inserted or exchanged."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(out) + 1), chance.choice([1, 2, 4, 16, 200])
        piece = out[at : at + length]
        action = chance.randrange(9)
        if action < 3 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif action == 3:
            del out[at : at + length]
        elif action == 4:
            out[at:at] = piece
        elif action == 5:
            out[at : at + length] = bytes(len(piece))
        elif action == 6:
            out[at : at + length] = b"\xff" * len(piece)
        elif action == 7:
            out[at:at] = chance.randbytes(length)
        elif chance.random() < 0.3:
            del out[at:]
    return bytes(out)


def mutated_text(text: str, chance: random.Random) -> bytes:
    """JSON as bytes, sometimes in another encoding or damaged."""
    action = chance.randrange(12)
    if action == 0:
        return text.encode("utf-16")
    if action == 1:
        return mutated_bytes(text.encode("utf-8", "surrogatepass"), chance)
    if action == 2:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if action == 3 and chance.random() < 0.2:
        return b"[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def with_right_sums(png: bytes) -> bytes:
    """A PNG with each chunk's checksum made right, so that damage gets past the first check."""
    out, at = bytearray(png), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack(">I", out[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


# --- the workshop ---
class Workshop:
    """A folder with one good thing of each kind, and a way to spoil each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = make_data(folder / "data", train=4, val=2)
        self.config_file = write_config(folder, self.data, n_classes=10, criterion={"bce": 1.0, "tree_min": 0.5})
        self.config = json.loads(self.config_file.read_text())
        everything = load_config(self.config_file).to_dict()
        self.full_config = everything
        self.trees = [json.loads(path.read_text()) for path in sorted(TREE.parent.glob("*.json"))]
        self.encoding = json.loads((self.data / "gt_masks_hie" / "encoding.json").read_text())
        self.tree = Hierarchy.load(TREE)
        self.manager = TrainManager(load_config(self.config_file))
        self.state = self.manager.state()
        self.checkpoint = pack(self.state)
        self.photos, self.masks = self._pictures()
        self.makers = {
            "config": self.config_case,
            "override": self.override_case,
            "tree": self.tree_case,
            "ids": self.ids_case,
            "mask": self.mask_case,
            "photo": self.photo_case,
            "encoding": self.encoding_case,
            "checkpoint": self.checkpoint_case,
        }

    def close(self) -> None:
        self.manager._close()

    def case(self, kind: str, chance: random.Random) -> Case:
        return self.makers[kind](chance)

    def _pictures(self) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
        generator = np.random.default_rng(0)
        colours = Image.fromarray(generator.integers(0, 255, (40, 36, 3), dtype=np.uint8))
        labels = Image.fromarray(generator.integers(0, 7, (40, 36), dtype=np.uint8))
        palette = labels.copy()
        palette.putpalette(list(range(256)) * 3)
        kinds = [
            (colours, "JPEG", ".jpg", {}),
            (colours, "PNG", ".png", {}),
            (colours.convert("CMYK"), "JPEG", ".jpg", {}),
        ]
        kinds += [(colours.convert("P"), "PNG", ".png", {}), (colours.convert("RGBA"), "PNG", ".png", {})]
        kinds += [(colours.convert("L"), "JPEG", ".jpg", {}), (colours, "JPEG", ".jpg", {"progressive": True})]
        kinds += [(colours, "JPEG", ".jpg", {"exif": _rotated()})]
        photos = [(suffix, _saved(image, kind, options)) for image, kind, suffix, options in kinds]
        masks = [(".png", _saved(image, "PNG", {})) for image in (labels, palette, colours, labels.convert("1"))]
        for array in (np.array(labels), np.array(labels, dtype=np.int64), np.array(labels, dtype=np.float32)):
            buffer = io.BytesIO()
            np.save(buffer, array)
            masks.append((".npy", buffer.getvalue()))
        return photos, masks

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / "case" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    # --- one maker for each kind of file ---
    def config_case(self, chance: random.Random) -> Case:
        base = chance.choice([self.config, self.full_config])
        values, touched = mutated_json(base, chance)
        content = mutated_text(json.dumps(values), chance)
        path = self._write("config.json", content)
        return Case(lambda: _use_config(load_config(path)), [str(path), *_keys(touched)], repr(content[:3000]))

    def override_case(self, chance: random.Random) -> Case:
        values, touched = mutated_json(self.full_config, chance, rounds=2)
        keys = [key for key in values if key in touched] or list(values)[:1]
        overrides = [f"{key}={json.dumps(values[key])}" for key in keys]
        if chance.random() < 0.2:
            overrides.append(_misspelt(overrides[0], chance))
        return Case(lambda: load_config(self.config_file, overrides), ["override"], repr(overrides)[:3000])

    def tree_case(self, chance: random.Random) -> Case:
        tree, _ = mutated_json(chance.choice(self.trees), chance)
        content = mutated_text(json.dumps(tree), chance)
        path = self._write("tree.json", content)
        return Case(lambda: _use_tree(Hierarchy.load(path)), [str(path)], repr(content[:3000]))

    def ids_case(self, chance: random.Random) -> Case:
        lines = (self.data / "train_id.txt").read_text().split()
        for _ in range(chance.randint(1, 3)):
            line = chance.choice(
                [*WORDS, "p00", "p00.jpg", "p00 1", "../p00", "p00\r", "p99", "\ufeffp01", "p\u202e00"]
            )
            lines.insert(chance.randint(0, len(lines)), line)
        content = chance.choice(["\n", "\r\n", "\n\n", ""]).join(lines).encode("utf-8", "surrogatepass")
        path = self._write("ids.txt", mutated_bytes(content, chance) if chance.random() < 0.3 else content)

        def use() -> None:
            find_samples(read_ids(path), self.data / "JPEGImages", self.data / "gt_masks_hie")

        return Case(use, [str(path), "JPEGImages"], repr(path.read_bytes()))

    def mask_case(self, chance: random.Random) -> Case:
        suffix, content = chance.choice(self.masks)
        if chance.random() < 0.9:
            content = mutated_bytes(content, chance)
        if chance.random() < 0.5:
            content = with_right_sums(content)
        suffix = chance.choice([suffix] * 9 + [".png", ".npy"])
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        path = self._write(f"masks/p00{suffix}", content)
        photo = self._write("photos/p00.jpg", self.photos[0][1])
        encoded = self.folder / "case" / "encoded"

        def use() -> None:
            try:
                encode_folder(path.parent, photo.parent, encoded, self.tree)
            except UserError:
                if encoded.exists():
                    raise PartialOutput(f"{sorted(encoded.iterdir())}") from None
                raise
            self._use_labels(Files(photo, encoded / "p00.png"))
            shutil.copy(path, encoded / "p00.png")  # changed after it was encoded
            self._use_labels(Files(photo, encoded / "p00.png"))

        return Case(use, ["p00"], repr(content[:3000]))

    def photo_case(self, chance: random.Random) -> Case:
        suffix, content = chance.choice(self.photos)
        content = mutated_bytes(content, chance)
        if suffix == ".png" and chance.random() < 0.7:
            content = with_right_sums(content)
        path = self._write(f"p00{suffix}", content)
        files = Files(path, self.data / "gt_masks_hie" / "p00.png")
        short_side = chance.choice([None, None, 32, 64])
        return Case(lambda: self._use_labels(files, short_side), [str(path)], repr(content[:3000]))

    def _use_labels(self, files: Files, short_side: int | None = None) -> None:
        """The photo and its labels as training and evaluation read them."""
        view = RandomView(32, short_side, [0.5, 2.0], 0.5, 0.0, 0.2, 255)
        sample = self.manager.loader.dataset
        for one in (
            TrainPhotos([files], view, 255, 32, sample.n_labels)[Draw(0, 1)],
            WholePhotos([files], short_side, sample.n_labels, 255)[0],
        ):
            if one.fault:
                raise UserError(one.fault)
            self.tree.encode(one.labels)

    def encoding_case(self, chance: random.Random) -> Case:
        record, _ = mutated_json(self.encoding, chance)
        content = mutated_text(json.dumps(record), chance)
        path = self._write("labels/encoding.json", content)
        return Case(lambda: load_encoding(path.parent, self.tree), [str(path)], repr(content[:3000]))

    def checkpoint_case(self, chance: random.Random) -> Case:
        if chance.random() < 0.4:
            content, touched = mutated_bytes(self.checkpoint, chance), "bytes"
        else:
            state, touched = _mutated_state(self.state, chance)
            content = pack(state)
        path = self._write("x.pt", content)

        def use() -> None:
            state = load_checkpoint(path)
            check_same_network(self.manager.config, self.tree, state, str(path))
            restore_network(state, str(path))
            self.manager._resume(str(path))

        return Case(use, [str(path)], repr(touched))


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _saved(image: Image.Image, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _keys(touched: list[str]) -> list[str]:
    return [f"'{key}'" for key in touched]


def _mutated_state(state: dict, chance: random.Random) -> tuple[dict, list[str]]:
    """A state with places replaced, tensors among them, at any depth."""
    state, touched = copy.deepcopy(state), []
    for _ in range(chance.randint(1, 3)):
        container, key = state, chance.choice(list(state))
        while isinstance(container[key], dict | list) and len(container[key]) and chance.random() < 0.7:
            container = container[key]
            key = chance.choice(list(container)) if isinstance(container, dict) else chance.randrange(len(container))
        touched.append(str(key))
        value, action = container[key], chance.randrange(5)
        if isinstance(value, torch.Tensor) and action < 3:
            container[key] = chance.choice(
                [value[..., None], value.double(), value.flatten()[:0], value.float() * 1e30]
            )
        elif action == 3 and isinstance(container, dict):
            del container[key]
        elif action == 4 and isinstance(container, dict):
            container[chance.choice(WORDS[2:9])] = container.pop(key)
        else:
            container[key] = chance.choice(chance.choice([WORDS[:14], NUMBERS[:11], OTHERS]))
        if not isinstance(state, dict) or not state:
            break
    return state, touched


# --- what is done with what was read without complaint ---
def _use_config(config: Config) -> None:
    """All that a training does with a config before it builds the network."""
    hierarchy = load_hierarchy(config)
    check_data(config, hierarchy)
    build_criterion(config.criterion, hierarchy, config.gamma, None)
    _, batches = train_loader(config, hierarchy, 0, 1)
    next(iter(batches))
    val_loader(config, hierarchy, ["p04"])
    for step in (0, 1, batches.n_batches * config.n_epochs):
        factor = lr_factor(step, batches.n_batches, config)
        if not 0 <= factor <= 1:
            raise ArithmeticError(f"lr_factor({step}) is {factor}")


def _use_tree(h: Hierarchy) -> None:
    labels = torch.tensor([[*range(h.num_nodes), h.ignore_index]])
    h.encode(labels)
    logits = torch.zeros(1, h.num_nodes, *labels.shape)
    leaves = DECODERS["logit_sum"](logits, h)
    meter = LevelScores(h)
    meter.update(leaves, labels[None], logits)
    meter.compute()
    if Hierarchy.from_dict(h.to_dict()).fingerprint != h.fingerprint:
        raise ArithmeticError("the tree is another one after writing and reading")


# --- running ---
def attempt(case: Case) -> str:
    """ "success" or "refused". Raises: whatever a case must not do."""

    def hang(_number, _frame):
        raise Hang

    handler = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            case.action()
    except UserError as error:
        message = str(error)
        if not any(culprit in message for culprit in case.culprits):
            raise AssertionError(f"the message names no culprit: {message}") from error
        message.encode("utf-8", "backslashreplace")
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    return "success"


def fuzz(
    cases: int, seed: int, first: int = 0, only: str | None = None, most_failures: int = 10
) -> tuple[Counter, list]:
    """Counts by (kind, outcome), and a text for each failure."""
    counts, failures = Counter(), []
    memory = Path("/dev/shm")  # a disk that others use takes most of the time
    folder = Path(tempfile.mkdtemp(prefix="hseg-fuzz-", dir=memory if memory.is_dir() else None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                workshop = Workshop(folder)
            kinds = [only] if only else list(workshop.makers)
            for number in tqdm(range(first, first + cases), desc="fuzz", mininterval=1):
                kind = kinds[number % len(kinds)]
                case = workshop.case(kind, random.Random(f"{seed}/{kind}/{number}"))
                try:
                    counts[kind, attempt(case)] += 1
                except (Exception, Hang):
                    where = f"--only {kind} --seed {seed} --first {number} --cases 1"
                    failures.append(f"{where}\n{case.description}\n{traceback.format_exc()}")
                    if len(failures) >= most_failures:
                        break
            workshop.close()
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--only", metavar="KIND", help="one kind of file, such as photo")
    parser.add_argument("--failures", type=int, default=10, metavar="N", help="stop after so many (default: 10)")
    arguments = parser.parse_args()
    from tests.preloaded import slim_down

    slim_down()
    counts, failures = fuzz(arguments.cases, arguments.seed, arguments.first, arguments.only, arguments.failures)
    print("\n\n".join(failures))
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:<12}{outcome:<10}{count:>8}")
    print(f"{sum(counts.values())} cases, {len(failures)} failures, seed {arguments.seed}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
