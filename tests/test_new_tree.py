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


def run(monkeypatch, path, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["new_tree.py", str(path), *arguments])
    new_tree.main()


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Writes a list and returns the tree that becomes of it."""

    def make(text: str, suffix: str = ".txt", *arguments: str) -> Hierarchy:
        (tmp_path / f"animals{suffix}").write_text(text)
        run(monkeypatch, tmp_path / f"animals{suffix}", "--out", str(tmp_path / "tree.json"), *arguments)
        return Hierarchy.load(tmp_path / "tree.json")

    return make


@pytest.mark.parametrize(("text", "suffix"), [(INDENTED, ".txt"), (CSV, ".csv")])
def test_a_list_becomes_a_tree(made, tmp_path, text, suffix):
    h = made(text, suffix)
    leaves = ["background", "cat_head", "left_ear", "right_ear", "bird_wing", "fish"]
    assert list(h.names) == [*leaves, "animal", "cat", "bird"]
    assert [h.names[v] for v in h.paths[h.names.index("left_ear")]] == ["animal", "cat", "left_ear"]
    assert h.background == {0}
    assert h.mirrors == {2: "right_ear", 3: "left_ear"}
    assert h.num_levels == 3
    with Image.open(tmp_path / "tree.png") as picture:
        found = {colour for _, colour in picture.getcolors(10**6)}
    assert found >= set(h.colours), "every class is drawn in its colour"


def test_a_list_of_values_gives_the_order_of_the_leaves(made):
    h = made("1: dog\n0: bg\ncat: 2, 7\n255: void\n")
    assert h.names == ("bg", "dog", "cat")
    assert h.background == {0}


@pytest.mark.parametrize("count", [3, 10, 60])
def test_colours_are_easy_to_tell_apart(count):
    all_of_them = np.array([[0, 0, 0], [255, 255, 255], *new_tree.colours(count)], dtype=int)
    least = min(np.abs(a - b).max() for a, b in itertools.combinations(all_of_them, 2))
    assert least >= {3: 120, 10: 60, 60: 20}[count]


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("cat\n    head\n  tail\n", ".txt", "line 3: 'tail' should be as far in .* say 4"),
        ("cat\n  head\ndog\n  head\n", ".txt", "same name 'head'"),
        ("", ".txt", "at least one node"),
        ("cat,animal\nhead,cat\n", ".csv", "name,parent"),
        ("name,parent\ncat,animal\n", ".csv", "one for each parent"),
        ("name,parent\ncat,dog\ndog,cat\n", ".csv", "cat"),
    ],
)
def test_a_list_that_is_no_tree_is_refused(made, text, suffix, message):
    with pytest.raises(UserError, match=message):
        made(text, suffix)


def test_a_tree_of_one_s_own_is_never_overwritten(made, tmp_path):
    made(INDENTED)
    before = (tmp_path / "tree.json").read_text()
    made(INDENTED)
    with pytest.raises(UserError, match="holds another tree"):
        made(INDENTED + "dog\n")
    assert (tmp_path / "tree.json").read_text() == before
