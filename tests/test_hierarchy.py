"""The tree file is read strictly, and its tables say what the definitions say."""

import json
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.hierarchy import Hierarchy

TREES = Path(__file__).resolve().parents[1] / "configs" / "hierarchies"


def test_pascal_part_is_the_tree_of_the_data(h: Hierarchy) -> None:
    assert h.names[:7] == ("background", "low_hand", "torso", "low_leg", "head", "up_leg", "up_hand")
    children = [h.children[h.names.index(name)] for name in ("upper_body", "lower_body", "body")]
    assert children == [(1, 2, 4, 6), (3, 5), (8, 9)]
    assert h.level_classes == ([0, 1, 2, 3, 4, 5, 6], [0, 8, 9], [0, 7])
    assert h.background == {0}


@pytest.mark.parametrize("path", sorted(TREES.glob("*.json")), ids=lambda path: path.stem)
def test_a_tree_survives_dict_and_json(path: Path) -> None:
    h = Hierarchy.load(path)
    assert Hierarchy.from_dict(h.to_dict()).to_dict() == h.to_dict() == json.loads(path.read_text())


def test_encode_marks_the_path_and_leaves_what_lies_below_unknown(h: Hierarchy) -> None:
    head, body, void = 4, 7, 255
    targets, known = h.encode(torch.tensor([[[head, body, void]]], dtype=torch.uint8))
    assert targets[0, :, 0, 0].nonzero().flatten().tolist() == [4, 7, 8]
    assert known[0, :, 0, 0].all()
    assert targets[0, :, 0, 1].nonzero().flatten().tolist() == [7]
    assert known[0, :, 0, 1].nonzero().flatten().tolist() == [0, 7]
    assert not known[0, :, 0, 2].logical_or(targets[0, :, 0, 2]).any()


def node(v: int, name: str, parent: int | None = None, **more: object) -> dict:
    return {"id": v, "name": name, "parent": parent, "colour": [v, 0, 0], **more}


GOOD = {"name": "t", "ignore_index": 255, "levels": ["leaf", "root"]}
GOOD["nodes"] = [node(0, "a"), node(1, "b", 2), node(2, "c")]


def with_node(v: int, **changes: object) -> dict:
    nodes = [*GOOD["nodes"]]
    nodes[v] = nodes[v] | changes
    return {"nodes": nodes}


BROKEN = {  # what differs from GOOD, and what is said
    "unknown key": ({"extra": 1}, "'extra'"),
    "duplicate id": (with_node(1, id=0), r"ids of the nodes are \[0, 0, 2\]"),
    "duplicate name": (with_node(1, name="a"), "same name 'a'"),
    "a node called void": (with_node(1, name="void"), "other than void"),
    "unknown parent": (with_node(1, parent=7), r"node 1 \(b\).*parent 7"),
    "cycle": (with_node(2, parent=1), "cycle.*b -> c -> b"),
    "bad colour": (with_node(0, colour=[0, 0, 256]), "'colour' is"),
    "same colour": (with_node(2, colour=[0, 0, 0]), "same colour"),
    "background with children": (with_node(2, background=True), "node 2"),
    "level name of another folder": ({"levels": ["leaf", "Overlay"]}, "'Overlay'.* none of overlay"),
    "repeated level names": ({"levels": ["leaf", "leaf"]}, "2 different names"),
    "void is a node": ({"ignore_index": 2}, "'ignore_index' is 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tree_is_refused_with_its_file_and_node(case: str, tmp_path: Path) -> None:
    changes, message = BROKEN[case]
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(UserError, match=rf"tree\.json.*{message}"):
        Hierarchy.load(path)
