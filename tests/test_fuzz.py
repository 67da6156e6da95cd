"""Two thousand spoilt configs, trees, id lists, masks, photos, encodings and checkpoints, and the code that reads them.

    pytest tests/test_fuzz.py --fuzz-cases 10000 --fuzz-seed 1      # of each kind
    pytest tests/test_fuzz.py -k photo --fuzz-seed 1 --fuzz-first 4711 --fuzz-cases 1     # one case again

Each case must end in success or in a `UserError` that names the culprit: never in another exception, a hang, or
output that is half there. A case is made from (seed, kind, number) alone.
"""

import copy
import faulthandler
import io
import json
import random
import shutil
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models.hseg
from configs.config import load_config
from manage.checkpoint import load_checkpoint, pack
from manage.network import restore_network
from manage.train_manager import TrainManager
from tests.factory import TREE, make_data, write_config
from tests.preloaded import SlimEncoder
from utils.dataset import Files, Photos, find_samples
from utils.decode import DECODERS
from utils.encoder import encode_folder
from utils.encoding import load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import read_ids
from utils.metrics import LevelScores

SECONDS = 60  # after which a case hangs
WORDS = ["", " ", "x", ".", "..", "../x", "a/b", "/", "/dev/null", "~", "~nobody/x", "C:\\x", "\0", "\n", "\ud800", "é"]
WORDS += ["x" * 300, "x/" * 600, "nan", "null", "true", "cuda:9", "cuda:", "max x", "max mIoU9", "bce", "resnet99", "0"]
NUMBERS = [0, 1, -1, 2, 33, 255, 256, 65536, 2**31, 2**53, 2**63, 10**30, 10**400, -(10**400)]
NUMBERS += [0.0, 0.5, -0.5, 1.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, [], [[]], [0], ["a"], [None], [1e308] * 5, {}, {"a": 1}]
OTHERS += [{"bce": -1}, {"bce": 1.0}, {"": {}}]
ID_LINES = [*WORDS, *["", " ", "p02\r", "p03 ", "\t"] * 5, "p00", "p00.jpg", "p00 1", "p99", "\ufeffp01", "p\u202e00"]
Case = tuple[Callable[[], object], list[str]]  # what is tried, and words of which a refusal must hold one


# --- spoiling ---
def spoilt(value, chance: random.Random):
    """A copy with one to three places deleted, renamed, replaced, repeated or moved; and the keys that were touched."""
    value, touched = copy.deepcopy(value), []
    for _ in range(chance.randint(1, 3)):
        if value:
            container, key = _place(value, chance)
            touched += [str(key), _spoil_place(container, key, value, chance)]
    return value, touched


def _place(value, chance: random.Random) -> tuple:
    """(container, key) of something inside, at any depth."""
    while True:
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            return value, key
        value = inner


def _spoil_place(container, key, root, chance: random.Random) -> str:
    """Changes one place; returns a key that is new there, or the old one."""
    action, value = chance.randrange(8), container[key]
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        name = misspelt(str(key), chance)
        container[name] = container.pop(key)
        return name
    elif action == 2:
        other, place = _place(root, chance)
        container[key] = copy.deepcopy(other[place])
    elif action == 3:
        container[key] = [value]
    elif isinstance(value, torch.Tensor):
        container[key] = chance.choice([value[..., None], value.double(), value.flatten()[:0], value.float() * 1e30])
    elif action == 4 and isinstance(value, int | float) and abs(value) < 2**53:
        container[key] = chance.choice([-value, value + 1, value - 1, value * 1000, value / 3, str(value)])
    elif action == 5 and isinstance(container, list):
        container.insert(key, copy.deepcopy(value))
    else:
        container[key] = copy.deepcopy(chance.choice(chance.choice([WORDS, NUMBERS, OTHERS])))
    return str(key)


def misspelt(word: str, chance: random.Random) -> str:
    i = chance.randrange(len(word) + 1)
    return chance.choice([word[:i] + word[i + 1 :], word.upper(), word + "s", word[:i] + "_" + word[i:], " " + word])


def spoilt_bytes(data: bytes, chance: random.Random) -> bytes:
    """A copy with bits flipped, and pieces cut, doubled, zeroed, inserted or exchanged."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(out) + 1), chance.choice([1, 2, 4, 16, 200])
        piece = out[at : at + length]
        flipped = bytes([b ^ 1 << chance.randrange(8) for b in piece[:1]]) + piece[1:]
        others = [b"", piece * 2, bytes(len(piece)), b"\xff" * len(piece), chance.randbytes(length) + piece]
        out[at : at + length] = chance.choice([flipped] * 4 + others)
        if chance.random() < 0.05:
            del out[at:]
    return bytes(out)


def spoilt_text(text: str, chance: random.Random) -> bytes:
    """A text as bytes, sometimes in another encoding or damaged."""
    data = text.encode("utf-8", "surrogatepass")
    odd = [lambda: text.encode("utf-16", "surrogatepass"), lambda: spoilt_bytes(data, chance)]
    odd += [lambda: b"\xef\xbb\xbf" + data, lambda: b"[" * 100_000]
    return chance.choice(odd)() if chance.random() < 0.25 else data


def with_right_sums(png: bytes) -> bytes:
    """A PNG with each chunk's checksum made right, so that damage gets past the first check."""
    out, at = bytearray(png), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- one good thing of each kind, and a way to spoil and use it ---
class Workshop:
    """Makes cases in a folder; a method of the name of each kind."""

    kinds = ("config", "override", "tree", "ids", "mask", "photo", "encoding", "checkpoint")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = make_data(folder / "data", train=4, val=2)
        self.config_file = write_config(folder, self.data, n_classes=10, criterion={"bce": 1.0, "tree_min": 0.5})
        self.values = load_config(self.config_file).to_dict()
        self.trees = [json.loads(path.read_text()) for path in sorted(TREE.parent.glob("*.json"))]
        self.record = json.loads((self.data / "gt_masks_hie" / "encoding.json").read_text())
        self.hierarchy = Hierarchy.load(TREE)
        self.manager = TrainManager(load_config(self.config_file))
        self.state = self.manager.state()
        self.packed = pack(self.state)
        colours = Image.open(self.data / "JPEGImages" / "p00.jpg").convert("RGB")
        self.photos = [(".png", saved(colours.convert(mode), "PNG")) for mode in ("RGB", "P", "RGBA")]
        self.photos += [(".jpg", saved(colours.convert(mode), "JPEG")) for mode in ("RGB", "CMYK", "L")]
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = saved(colours.rotate(90, expand=True), "JPEG", exif=exif)
        self.photos += [(".jpg", saved(colours, "JPEG", progressive=True)), (".jpg", turned)]
        labels = Image.open(self.data / "gt_masks" / "p00.png")
        palette = labels.copy()
        palette.putpalette(list(range(256)) * 3)
        self.masks = [(".png", saved(image, "PNG")) for image in (labels, palette, colours, labels.convert("1"))]
        for kind in (np.uint8, np.int64, np.float32):
            np.save(buffer := io.BytesIO(), np.array(labels, dtype=kind))
            self.masks.append((".npy", buffer.getvalue()))

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / "case" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def config(self, chance: random.Random) -> Case:
        values, touched = spoilt(chance.choice([json.loads(self.config_file.read_text()), self.values]), chance)
        path = self._write("config.json", spoilt_text(json.dumps(values), chance))
        said = [word for key in touched for word in (f"'{key}'", values.get(key)) if isinstance(word, str) and word[1:]]
        return lambda: TrainManager(load_config(path)), [str(path), "'batch_size'", *said]

    def override(self, chance: random.Random) -> Case:
        values, touched = spoilt(self.values, chance)
        words = [f"{key}={json.dumps(values[key])}" for key in touched if key in values] or ["lr=0.1"]
        if chance.random() < 0.2:
            words.append(misspelt(words[0], chance))
        return lambda: load_config(self.config_file, words), ["override"]

    def tree(self, chance: random.Random) -> Case:
        path = self._write("tree.json", spoilt_text(json.dumps(spoilt(chance.choice(self.trees), chance)[0]), chance))
        return lambda: use_tree(Hierarchy.load(path)), [str(path)]

    def ids(self, chance: random.Random) -> Case:
        lines = (self.data / "train_id.txt").read_text().split()[:2]
        for _ in range(chance.randint(1, 3)):
            lines.insert(chance.randint(0, len(lines)), chance.choice(ID_LINES))
        path = self._write("ids.txt", spoilt_text(chance.choice(["\n", "\r\n", "\n\n"]).join(lines), chance))
        folders = self.data / "JPEGImages", self.data / "gt_masks_hie"
        return lambda: find_samples(read_ids(path), *folders), [str(path), "JPEGImages"]

    def mask(self, chance: random.Random) -> Case:
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        suffix, content = chance.choice(self.masks)
        if chance.random() < 0.8:
            content = spoilt_bytes(content, chance)
        if chance.random() < 0.5:
            content = with_right_sums(content)
        suffix = chance.choice([suffix] * 9 + [".png", ".npy"])
        path = self._write(f"masks/p00{suffix}", content)
        photo, encoded = self._write("photos/p00.jpg", self.photos[3][1]), self.folder / "case" / "encoded"

        def use() -> None:
            try:
                encode_folder(path.parent, photo.parent, encoded, self.hierarchy)
            except UserError:
                assert not list(encoded.glob("*.png")), "left by a refused case"
                raise
            self._use_photo(Files(photo, encoded / "p00.png"))
            shutil.copy(path, encoded / "p00.png")  # changed after it was encoded
            self._use_photo(Files(photo, encoded / "p00.png"))

        return use, ["p00"]

    def photo(self, chance: random.Random) -> Case:
        suffix, content = chance.choice(self.photos)
        content = spoilt_bytes(content, chance)
        if suffix == ".png" and chance.random() < 0.7:
            content = with_right_sums(content)
        files = Files(self._write(f"p00{suffix}", content), self.data / "gt_masks_hie" / "p00.png")
        short_side = chance.choice([None, None, 32, 64])
        return lambda: self._use_photo(files, short_side), [str(files.photo)]

    def encoding(self, chance: random.Random) -> Case:
        content = spoilt_text(json.dumps(spoilt(self.record, chance)[0]), chance)
        path = self._write("labels/encoding.json", content)
        return lambda: load_encoding(path.parent, self.hierarchy), [str(path)]

    def checkpoint(self, chance: random.Random) -> Case:
        damaged = chance.random() < 0.4
        content = spoilt_bytes(self.packed, chance) if damaged else pack(spoilt(self.state, chance)[0])
        path = self._write("x.pt", content)
        return lambda: self._use_checkpoint(path), [str(path)]

    # --- what is done with what was read without complaint ---
    def _use_photo(self, files: Files, short_side: int | None = None) -> None:
        """A photo and its labels as training and evaluation read them."""
        n_labels = self.manager.loader.store.photos.n_labels
        for native_labels in (False, True):
            sample = Photos([files], short_side, n_labels, 255, native_labels)[0]
            if sample.fault:
                raise UserError(sample.fault)
            self.hierarchy.encode(sample.labels)

    def _use_checkpoint(self, path: Path) -> None:
        restore_network(load_checkpoint(path), str(path))
        self.manager._go_on_from(path, is_new=False)


def use_tree(h: Hierarchy) -> None:
    labels = torch.tensor([[*range(h.num_nodes), h.ignore_index]])
    h.encode(labels)
    logits = torch.zeros(1, h.num_nodes, *labels.shape)
    meter = LevelScores(h)
    meter.update(DECODERS["logit_sum"](logits, h), labels[None], logits)
    meter.compute()
    assert Hierarchy.from_dict(h.to_dict()).fingerprint == h.fingerprint, "another tree after writing and reading"


# --- the tests ---
@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.hseg, "build_encoder", SlimEncoder)
        yield Workshop(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", Workshop.kinds)
def test_a_spoilt_file_is_read_or_refused_by_name(workshop, kind, pytestconfig):
    seed, first, cases = (int(pytestconfig.getoption(f"--fuzz-{name}")) for name in ("seed", "first", "cases"))
    outcomes, failures = Counter(), []
    for number in range(first, first + cases):
        use, culprits = getattr(workshop, kind)(random.Random(f"{seed}/{kind}/{number}"))
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # it hangs
        try:
            use()
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            if not any(culprit in str(error) for culprit in culprits):
                failures.append(f"case {number} names no culprit: {error}")
        except Exception:
            failures.append(f"case {number}: {traceback.format_exc()}")
    faulthandler.cancel_dump_traceback_later()
    assert not failures, "\n\n".join(failures[:10])
    assert cases < 250 or (outcomes["read"] and outcomes["refused"]), f"all alike, so little is tried: {outcomes}"
