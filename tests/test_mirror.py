"""In a mirrored photo a left arm is a right arm: in the tree, in training, and in test-time augmentation."""

import pytest
import torch
from PIL import Image

from configs.config import load_config
from manage.data import TrainLoader
from manage.predictor import Predictor
from tests.factory import make_data, write_config
from tests.reference import tree_of
from tests.test_predict import noise, write_checkpoint
from utils.errors import UserError
from utils.hierarchy import Hierarchy

NAMES = [("background", None), ("left_arm", 3), ("right_arm", 4), ("left", 5), ("right", 5), ("body", None)]
MIRRORS = {"left_arm": "right_arm", "right_arm": "left_arm", "left": "right", "right": "left"}


def tree(mirrors: dict) -> dict:
    nodes = [{"id": v, "name": n, "parent": p, "colour": [v, 0, 0]} for v, (n, p) in enumerate(NAMES)]
    for node in nodes:
        node |= {"mirror": mirrors[node["name"]]} if node["name"] in mirrors else {}
    return {"name": "sides", "ignore_index": 255, "levels": ["arm", "side", "body"], "nodes": nodes}


def test_labels_of_a_pair_swap_in_mirrored_views_which_a_tree_that_does_not_say_so_refuses(tmp_path):
    data, names = make_data(tmp_path / "data"), ["background", "left_arm", "right_arm", "a", "b", "c", "d"]
    plain = tree_of([None] * 7, names, ignore_index=255)
    paired = plain.to_dict()
    paired["nodes"][1]["mirror"], paired["nodes"][2]["mirror"] = names[2], names[1]

    def labels(h: Hierarchy, hflip: float) -> torch.Tensor:
        config = load_config(write_config(tmp_path, data, hflip=hflip))
        return torch.cat([batch.labels for batch in TrainLoader(config, h)])

    upright, mirrored = (labels(Hierarchy.from_dict(paired), hflip) for hflip in (0.0, 1.0))
    assert torch.equal(upright, labels(plain, 0.0))
    swapped = torch.tensor([0, 2, 1, *range(3, 256)])[upright.long()].flip(-1)
    assert torch.equal(mirrored.long(), swapped)
    assert {1, 2} <= {*mirrored.unique().tolist()}
    with pytest.raises(UserError, match=r'(?s)pascal_part.json: .*left_arm: "mirror": "right_arm".*hflip=0'):
        labels(plain, 0.5)


def test_tta_swaps_the_logits_of_a_pair_and_is_refused_where_the_tree_does_not_say_what_swaps(tmp_path):
    photo, h = noise(75, 50), Hierarchy.from_dict(tree(MIRRORS))
    predictor = Predictor.load(write_checkpoint(tmp_path / "best.pt", h), "cpu", tta="flip")
    ours = predictor(photo).logits
    theirs = predictor(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).logits.flip(-1)
    torch.testing.assert_close(ours, theirs[list(h.mirror)], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    with pytest.raises(UserError, match=r"(?s)'left_arm' and 'right_arm'.*leave out tta"):
        Predictor.load(write_checkpoint(tmp_path / "open.pt", Hierarchy.from_dict(tree({}))), "cpu", tta="flip")


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
