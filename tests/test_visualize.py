"""Pictures of label maps: the right colours in the right places."""

import numpy as np
import pytest
from PIL import Image

from utils import visualize
from utils.images import read_labels


def test_an_overlay_leaves_background_and_void_as_they_are(tree):
    photo = np.full((1, 3, 3), 100, np.uint8)
    picture = visualize.overlay(photo, np.array([[0, 255, 2]], np.uint8), tree)
    assert np.array_equal(picture[:, :2], photo[:, :2])
    assert picture[0, 2] == pytest.approx(0.4 * 100 + 0.6 * np.array(tree.colours[2]), abs=2)


def test_maps_are_written_at_full_size_and_the_overlay_has_a_legend_of_all_colours(tree, tmp_path):
    leaves, photo = np.full((60, 3000), 2, np.uint8), np.full((60, 3000, 3), 100, np.uint8)
    visualize.write_maps(tmp_path, "deep/a.b", photo, leaves, tree)
    for level, name in enumerate(tree.level_names):
        assert np.array_equal(read_labels(tmp_path / name / "deep" / "a.b.png"), tree.level_of(leaves, level))
    with Image.open(tmp_path / "overlay" / "deep" / "a.b.jpg") as written:
        assert written.width == 3000
        assert written.height > 60
    visualize.write_maps(tmp_path, "wide", np.zeros((2, 70_000, 3), np.uint8), np.zeros((2, 70_000), np.uint8), tree)
    assert Image.open(tmp_path / "overlay" / "wide.jpg").width == visualize.LARGEST_JPEG
    assert read_labels(tmp_path / "parts" / "wide.png").shape == (2, 70_000)
    for width in (150, 2000):
        colours = {tuple(colour) for colour in visualize.legend(tree, width).reshape(-1, 3).tolist()}
        assert set(tree.colours) <= colours


def test_a_sheet_shows_the_map_of_each_level_in_its_colours_and_grey_void(tree):
    labels = np.full((30, 30), 4, np.uint8)
    labels[:, 20:] = 255
    sheet = visualize.gallery([visualize.level_maps(labels, tree, 50)], tree.level_names, tree, side=50)
    for level in range(tree.num_levels):
        left, right = sheet[24 + 27, 54 * level + 15], sheet[24 + 27, 54 * level + 45]
        assert left.tolist() == list(tree.colours[tree.level_of(labels, level)[0, 0]])
        assert right.tolist() == list(visualize.VOID_COLOUR)
