"""Two thousand spoilt configs, trees, id lists, masks, photos, encodings and checkpoints, and the code that reads them.

    pytest tests/test_fuzz.py --fuzz-cases 10000 --fuzz-seed 1      # of each kind

Each case must end in success or in a `UserError` that names the culprit: never in another exception, a hang, or
output that is half there. A case is made from (seed, kind, number) alone.
"""

import copy
import faulthandler
import io
import json
import math
import random
import shutil
import traceback
import zlib
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
from tests.factory import TREE, SlimEncoder, make_data, write_config
from utils.dataset import Files, Photos, find_samples
from utils.decode import DECODERS
from utils.encoder import Encoder
from utils.encoding import load_encoding
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.ids import read_ids
from utils.metrics import LevelScores

WORDS = ["", " ", "x", ".", "..", "../x", "a/b", "/", "/dev/null", "~", "~nobody/x", "C:\\x", "\0", "\n", "\ud800", "é"]
WORDS += ["x" * 300, "x/" * 600, "nan", "null", "true", "cuda:9", "cuda:", "max x", "max mIoU9", "bce", "resnet99", "0"]
NUMBERS = [0, 1, -1, 33, 256, 65536, 2**31, 2**63, 10**400, 0.0, -0.5, 1.5, 1e308, 5e-324, math.nan, -math.inf]
OTHERS = [None, True, [], [[]], [0], ["a"], [None], [1e308] * 5, {}, {"a": 1}, {"bce": -1}, {"bce": 1.0}, {"": {}}]
ID_LINES = [*WORDS, *["", " ", "p02\r", "p03 ", "\t"] * 5, "p00", "p00.jpg", "p00 1", "p99", "\ufeffp01", "p\u202e00"]
Case = tuple[Callable[[], object], list[str]]  # what is tried, and words of which a refusal must hold one


def spoilt(value, chance: random.Random):
    """A copy with one to three places deleted, renamed, replaced, wrapped or moved; and the keys that were touched."""
    value, touched = copy.deepcopy(value), []
    for _ in range(chance.randint(1, 3)):
        if value:
            (container, key), (other, place) = _place(value, chance), _place(value, chance)
            old, new = container[key], copy.deepcopy(chance.choice(chance.choice([WORDS, NUMBERS, OTHERS])))
            touched.append(str(key))
            if isinstance(old, torch.Tensor):
                new = chance.choice([old[..., None], old.double(), old.flatten()[:0], old.float() * 1e30])
            elif isinstance(old, int | float) and abs(old) < 2**53:
                new = chance.choice([-old, old + 1, old - 1, old * 1000, old / 3, str(old), new, new])
            container[key] = chance.choice([new, new, new, [old], copy.deepcopy(other[place])])
            if chance.random() < 0.25:
                del container[key]
                if isinstance(container, dict) and chance.random() < 0.5:
                    touched.append(misspelt(str(key), chance))
                    container[touched[-1]] = old
    return value, touched


def _place(value, chance: random.Random) -> tuple:
    """(container, key) of something inside, at any depth."""
    while True:
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            return value, key
        value = inner


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
    return bytes(out)


def spoilt_text(text: str, chance: random.Random) -> bytes:
    """A text as bytes, sometimes in another encoding or damaged."""
    data = text.encode("utf-8", "surrogatepass")
    odd = [text.encode("utf-16", "surrogatepass"), spoilt_bytes(data, chance), b"\xef\xbb\xbf" + data, b"[" * 100_000]
    return chance.choice(odd) if chance.random() < 0.25 else data


def with_right_sums(png: bytes) -> bytes:
    """A PNG with each chunk's checksum made right, so that damage gets past the first check."""
    out, at = bytearray(png), 8
    while (end := at + 8 + int.from_bytes(out[at : at + 4], "big")) + 4 <= len(out):
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def saved(image: Image.Image, kind: str) -> bytes:
    image.save(buffer := io.BytesIO(), kind, progressive=image.mode == "L")
    return buffer.getvalue()


class Workshop:
    """Makes cases in a folder; a method of the name of each kind."""

    kinds = ("config", "tree", "ids", "mask", "photo", "encoding", "checkpoint")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = make_data(folder / "data", train=4, val=2)
        self.config_file = write_config(folder, self.data, n_classes=10, criterion={"bce": 1.0, "tree_min": 0.5})
        self.trees = [json.loads(path.read_text()) for path in sorted(TREE.parent.glob("*.json"))]
        self.hierarchy = Hierarchy.load(TREE)
        self.manager = TrainManager(load_config(self.config_file))
        colours, labels = Image.open(self.data / "JPEGImages/p00.jpg"), Image.open(self.data / "gt_masks/p00.png")
        kinds = [("png", mode) for mode in ("RGB", "P", "RGBA")] + [("jpeg", mode) for mode in ("RGB", "CMYK", "L")]
        self.photos = [(f".{kind}", saved(colours.convert(mode), kind)) for kind, mode in kinds]
        self.masks = [(".png", saved(image, "png")) for image in (labels, colours, labels.convert("1"))]
        np.save(buffer := io.BytesIO(), np.array(labels, dtype=np.float32))
        self.masks.append((".npy", buffer.getvalue()))

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / "case" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def config(self, chance: random.Random) -> Case:
        """A file, or overrides of a good one."""
        values, touched = spoilt(self.manager.config.to_dict(), chance)
        if chance.random() < 0.4:
            words = [f"{key}={json.dumps(values[key])}" for key in touched if key in values]
            return lambda: load_config(self.config_file, [*words, misspelt("lr=0.1", chance)]), ["override"]
        path = self._write("config.json", spoilt_text(json.dumps(values), chance))
        said = [word for key in touched for word in (f"'{key}'", values.get(key)) if isinstance(word, str) and word[1:]]
        said += [str(path), "'batch_size'", "'img_dir'", "root_data_dir", "the id file"]
        return lambda: TrainManager(load_config(path)), said

    def tree(self, chance: random.Random) -> Case:
        path = self._write("tree.json", spoilt_text(json.dumps(spoilt(chance.choice(self.trees), chance)[0]), chance))
        return lambda: use_tree(Hierarchy.load(path)), [str(path)]

    def ids(self, chance: random.Random) -> Case:
        lines = (self.data / "train_id.txt").read_text().split()[:2]
        for _ in range(chance.randint(1, 3)):
            lines.insert(chance.randint(0, len(lines)), chance.choice(ID_LINES))
        path = self._write("ids.txt", spoilt_text(chance.choice(["\n", "\r\n", "\n\n"]).join(lines), chance))
        photos, labels = self.data / "JPEGImages", self.data / "gt_masks_hie"
        return lambda: find_samples(read_ids(path), photos, labels), [str(path), "JPEGImages"]

    def mask(self, chance: random.Random) -> Case:
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        path = self._picture("masks/p00", self.masks, chance)
        photo, encoded = self._write("photos/p00.jpeg", self.photos[3][1]), self.folder / "case" / "encoded"

        def use() -> None:
            try:
                Encoder(path.parent, photo.parent, encoded, self.hierarchy).run()
            except UserError:
                assert not list(encoded.glob("*.png")), "left by a refused case"
                raise
            self._use_photo(Files(photo, encoded / "p00.png"))

        return use, ["p00"]

    def photo(self, chance: random.Random) -> Case:
        files = Files(self._picture("p00", self.photos, chance), self.data / "gt_masks_hie" / "p00.png")
        return lambda: self._use_photo(files, chance.choice([None, 32])), [str(files.photo)]

    def _picture(self, name: str, good: list[tuple[str, bytes]], chance: random.Random) -> Path:
        suffix, content = chance.choice(good)
        content = spoilt_bytes(content, chance) if chance.random() < 0.9 else content
        content = with_right_sums(content) if suffix == ".png" and chance.random() < 0.7 else content
        return self._write(name + suffix, content)

    def encoding(self, chance: random.Random) -> Case:
        record = json.loads((self.data / "gt_masks_hie" / "encoding.json").read_text())
        path = self._write("labels/encoding.json", spoilt_text(json.dumps(spoilt(record, chance)[0]), chance))
        return lambda: load_encoding(path.parent, self.hierarchy), [str(path)]

    def checkpoint(self, chance: random.Random) -> Case:
        state = self.manager.state()
        content = spoilt_bytes(pack(state), chance) if chance.random() < 0.4 else pack(spoilt(state, chance)[0])
        path = self._write("x.pt", content)
        go_on = self.manager._go_on_from
        return lambda: [restore_network(load_checkpoint(path), str(path)), go_on(path)], [str(path)]

    def _use_photo(self, files: Files, short_side: int | None = None) -> None:
        """A photo and its labels as training and evaluation read them."""
        for native_labels in (False, True):
            sample = Photos([files], short_side, self.hierarchy.num_nodes, 255, native_labels)[0]
            if sample.fault:
                raise UserError(sample.fault)
            self.hierarchy.encode(sample.labels)


def use_tree(h: Hierarchy) -> None:
    labels = torch.tensor([[[*range(h.num_nodes), h.ignore_index]]])
    logits, meter = h.encode(labels)[0], LevelScores(h)
    meter.update(DECODERS["logit_sum"](logits, h), labels, logits)
    meter.compute()
    assert Hierarchy.from_dict(h.to_dict()).fingerprint == h.fingerprint, "another tree after writing and reading"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.hseg, "build_encoder", SlimEncoder)
        yield Workshop(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", Workshop.kinds)
def test_a_spoilt_file_is_read_or_refused_by_name(workshop, kind, pytestconfig):
    seed, cases = (int(pytestconfig.getoption(f"--fuzz-{name}")) for name in ("seed", "cases"))
    refused, failures = 0, []
    for number in range(cases):
        use, culprits = getattr(workshop, kind)(random.Random(f"{seed}/{kind}/{number}"))
        faulthandler.dump_traceback_later(60, exit=True)  # it hangs
        try:
            use()
        except UserError as error:
            refused += 1
            if not any(culprit in str(error) for culprit in culprits):
                failures.append(f"case {number} names no culprit: {error}")
        except Exception:
            failures.append(f"case {number}: {traceback.format_exc()}")
    faulthandler.cancel_dump_traceback_later()
    assert not failures, "\n\n".join(failures[:10])
    assert cases < 100 or 0 < refused < cases, "all alike, so little is tried"
