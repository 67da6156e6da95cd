"""In a mirrored photo a left arm is a right arm: in the tree, in training, and in test-time augmentation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from configs.config import load_config
from manage.data import TrainLoader
from manage.network import tree_changes
from manage.predictor import Predictor
from tests.factory import write_config
from tests.reference import tree_of
from tests.test_predict import noise, write_checkpoint
from utils.encoder import Encoder
from utils.errors import UserError
from utils.hierarchy import Hierarchy

NAMES = [("background", None), ("left_arm", 3), ("right_arm", 4), ("left", 5), ("right", 5), ("body", None)]
MIRRORS = {"left_arm": "right_arm", "right_arm": "left_arm", "left": "right", "right": "left"}
LEFT_ARM, RIGHT_ARM = 1, 2


def tree(mirrors: dict) -> dict:
    nodes = [{"id": v, "name": n, "parent": p, "colour": [v, 0, 0]} for v, (n, p) in enumerate(NAMES)]
    for node in nodes:
        node |= {"mirror": mirrors[node["name"]]} if node["name"] in mirrors else {}
    return {"name": "sides", "ignore_index": 255, "levels": ["arm", "side", "body"], "nodes": nodes}


@pytest.fixture
def train(tmp_path):
    """The loader of a set in which every left arm lies in the right half of the picture, always mirrored by chance."""
    for name in ("JPEGImages", "gt_masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(8):
        mask = np.zeros((64, 64), np.uint8)
        mask[10:50, 5:15], mask[10:50, 50:60] = RIGHT_ARM, LEFT_ARM
        Image.fromarray(mask).save(tmp_path / f"data/gt_masks/p{i}.png")
        noise(64, 64).save(tmp_path / f"data/JPEGImages/p{i}.jpg")
    for name in ("train", "val"):
        (tmp_path / f"data/{name}_id.txt").write_text("\n".join(f"p{i}" for i in range(8)))

    def build(mirrors: dict, **keys):
        path = tmp_path / "tree.json"
        path.write_text(json.dumps(tree(mirrors)))
        h, data = Hierarchy.load(path), tmp_path / "data"
        Encoder(data / "gt_masks", data / "JPEGImages", data / "gt_masks_hie", h).run()
        keys = {"hierarchy": str(path), "crop_size": 64, "scale_jitter": None, "hflip": 0.5} | keys
        return TrainLoader(load_config(write_config(tmp_path, data, **keys)), h)

    return build


def halves(labels: torch.Tensor) -> tuple[set, set]:
    return {*labels[..., :32].unique().tolist()}, {*labels[..., 32:].unique().tolist()}


def test_a_left_arm_stays_a_left_arm_in_every_view(train):
    seen = torch.cat([batch.labels for batch in train(MIRRORS)])
    assert halves(seen) == ({0, RIGHT_ARM}, {0, LEFT_ARM})
    assert len({int(labels.argmax()) for labels in seen}) > 1, "some are mirrored: the arms lie 5 and 4 pixels inside"


def test_sides_without_a_mirror_are_refused_while_views_are_flipped(train):
    with pytest.raises(UserError, match=r'(?s)tree.json: .*left_arm: "mirror": "right_arm".*hflip=0'):
        train({})
    assert halves(next(iter(train({}, hflip=0.0))).labels)[0] == {0, RIGHT_ARM}


def test_tta_swaps_the_logits_of_a_pair_and_is_refused_where_the_tree_does_not_say_what_swaps(tmp_path):
    photo, h = noise(75, 50), Hierarchy.from_dict(tree(MIRRORS))
    predictor = Predictor.load(write_checkpoint(tmp_path / "best.pt", h), "cpu", tta="flip")
    ours = predictor(photo).logits
    theirs = predictor(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).logits.flip(-1)
    torch.testing.assert_close(ours, theirs[list(h.mirror)], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    with pytest.raises(UserError, match=r"(?s)'left_arm' and 'right_arm'.*leave out tta"):
        Predictor.load(write_checkpoint(tmp_path / "open.pt", Hierarchy.from_dict(tree({}))), "cpu", tta="flip")


def test_mirrors_survive_the_dict_and_count_as_a_change():
    h, plain = Hierarchy.from_dict(tree(MIRRORS)), Hierarchy.from_dict(tree({}))
    assert h.mirror == (0, 2, 1, 4, 3, 5)
    assert plain.mirror is None
    assert h.to_dict() == tree(MIRRORS)
    assert h.fingerprint == plain.fingerprint
    assert tree_changes(plain, h) == ["mirrors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left_arm": "right_hand"}, r"node 1 \(left_arm\) names the mirror 'right_hand', which is no node"),
        ({"right_arm": "right_arm"}, r"names the mirror 'right_arm', which is no node that names it"),
        ({"left": "left", "right": "right"}, r"mirror of node 1 \(left_arm\) is 'right_arm'; two nodes that swap"),
        ({"left_arm": 2}, "'mirror' is 2; it must be the name"),
    ],
)
def test_a_mirror_that_gives_no_tree_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Hierarchy.from_dict(tree(MIRRORS | change))


def test_names_that_look_like_sides_are_paired():
    names = "left_arm right_arm LeftShoe RightShoe arm.L arm.R leye reye lear rear head left_over l_bow".split()
    assert tree_of([None] * len(names), names).unpaired_sides() == list(zip(names[:10:2], names[1:10:2], strict=True))
    assert not tree_of([None] * 2, ["land", "rand"]).unpaired_sides()
