"""tools/new_tree.py: from lists of classes as people have them to a tree file that loads."""

import itertools

import numpy as np
import pytest
from PIL import Image

from tools import new_tree
from utils.errors import UserError
from utils.hierarchy import Hierarchy

INDENTED = """background
animal
  cat
    cat_head
    left_ear
    right_ear   # as the cat sees it
  bird
\tbird_wing
  fish
"""
CSV = "name,parent\nbackground,\nanimal,\ncat,animal\ncat_head,cat\nleft_ear,cat\nright_ear,cat\n"
CSV += "bird,animal\nbird_wing,bird\nfish,animal\n"


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Writes a list and returns the tree that becomes of it."""

    def make(text: str, suffix: str = ".txt") -> Hierarchy:
        (path := tmp_path / f"animals{suffix}").write_text(text)
        monkeypatch.setattr("sys.argv", ["new_tree.py", str(path), "--out", str(tmp_path / "tree.json")])
        new_tree.main()
        return Hierarchy.load(tmp_path / "tree.json")

    return make


@pytest.mark.parametrize(("text", "suffix"), [(INDENTED, ".txt"), (CSV, ".csv")])
def test_a_list_becomes_a_tree_that_is_never_overwritten(made, tmp_path, text, suffix):
    h = made(text, suffix)
    leaves = ["background", "cat_head", "left_ear", "right_ear", "bird_wing", "fish"]
    assert list(h.names) == [*leaves, "animal", "cat", "bird"]
    assert [h.names[v] for v in h.paths[h.names.index("left_ear")]] == ["animal", "cat", "left_ear"]
    assert h.background == {0}
    assert h.mirrors == {2: "right_ear", 3: "left_ear"}
    with Image.open(tmp_path / "tree.png") as picture:
        assert set(h.colours) <= {colour for _, colour in picture.getcolors(10**6)}, "every class is drawn"
    with pytest.raises(UserError, match="holds another tree"):
        made("dog\n")
    assert Hierarchy.load(tmp_path / "tree.json").to_dict() == made(text, suffix).to_dict()


@pytest.mark.parametrize("text", ["1: dog\n0: bg\ncat: 2, 7\n255: void\n", "bg: #000000\ndog: #0a0b0c #mine\ncat: *\n"])
def test_a_list_of_values_gives_the_order_of_the_leaves(made, text):
    h = made(text)
    assert h.names == ("bg", "dog", "cat")
    assert h.background == {0}


@pytest.mark.parametrize(("count", "least"), [(3, 120), (10, 60), (60, 20)])
def test_colours_are_easy_to_tell_apart(count, least):
    all_of_them = np.array([[0, 0, 0], [255, 255, 255], *new_tree.colours(count)], dtype=int)
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(all_of_them, 2)) >= least


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("cat\n    head\n  tail\n", ".txt", "line 3: 'tail' should be as far in .* say 4"),
        ("cat\n  head\ndog\n  head\n", ".txt", "same name 'head'"),
        ("cat\n  cat\n", ".txt", "cycle, cat -> cat"),
        ("", ".txt", "at least one node"),
        ("cat,animal\nhead,cat\n", ".csv", "name,parent"),
        ("name,parent\ncat,animal\n", ".csv", "one for each parent"),
    ],
)
def test_a_list_that_is_no_tree_is_refused(made, text, suffix, message):
    with pytest.raises(UserError, match=message):
        made(text, suffix)
