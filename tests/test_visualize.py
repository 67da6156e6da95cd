"""Pictures of label maps: the right colours in the right places."""

import numpy as np
import pytest

from utils import visualize


def test_a_colour_map_shows_the_trees_colours_and_grey_void(tree):
    picture = visualize.level_maps(np.array([[0, 4, 255]], np.uint8), tree, side=3)[0]
    assert picture.tolist() == [[list(tree.colours[0]), list(tree.colours[4]), list(visualize.VOID_COLOUR)]]


def test_an_overlay_leaves_background_and_void_as_they_are(tree):
    photo = np.full((1, 3, 3), 100, np.uint8)
    picture = visualize.overlay(photo, np.array([[0, 255, 2]], np.uint8), tree)
    assert np.array_equal(picture[:, :2], photo[:, :2])
    expected = 0.4 * 100 + 0.6 * np.array(tree.colours[2])
    assert picture[0, 2] == pytest.approx(expected, abs=2)


def test_a_legend_shows_each_colour_and_wraps_to_its_width(tree):
    wide, slim = (visualize.legend(tree, width) for width in (2000, 150))
    assert slim.shape[0] > wide.shape[0]
    for picture in (wide, slim):
        colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
        assert set(tree.colours) <= colours
    normal, large = (visualize.legend(tree, width, [4]) for width in (500, 3000))
    assert large.shape[0] > 3 * normal.shape[0]  # it grows with its picture


def test_a_captioned_overlay_has_the_size_of_the_map_and_a_legend_without_background(tree):
    leaves = np.full((60, 300), 2, np.uint8)
    picture = visualize.captioned_overlay(np.full((20, 100, 3), 100, np.uint8), leaves, tree)
    assert np.array_equal(picture[:60], visualize.overlay(np.full((60, 300, 3), 100, np.uint8), leaves, tree))
    legend = {tuple(colour) for colour in picture[60:].reshape(-1, 3).tolist()}
    assert legend >= {tree.colours[leaf] for leaf in tree.leaves if leaf not in tree.background}
    assert visualize.captioned_overlay(picture, leaves, tree, largest=150).shape[1] == 200  # room for the legend


def test_a_board_shows_truth_over_prediction_at_every_level(tree):
    truth, leaves = np.full((30, 30), 4, np.uint8), np.full((30, 30), 2, np.uint8)
    board = visualize.board(np.zeros((10, 10, 3), np.uint8), truth, leaves, tree, side=50)
    assert board.shape[1] == 54 * (1 + tree.num_levels)
    for level in range(tree.num_levels):
        middle = 54 * (1 + level) + 27
        for row, labels in ((24 + 27, truth), (2 * 24 + 54 + 27, leaves)):
            assert board[row, middle].tolist() == list(tree.colours[tree.level_of(labels, level)[0, 0]])


def test_the_diagonal_of_a_perfect_confusion_is_the_darkest():
    count, cell = 12, 44
    picture = visualize.confusion_picture(np.diag([5] * count), [*"abcdefghijkl"], cell).astype(int).sum(-1)
    corner = picture[-6 - cell * count :, -8 - cell * count :]
    cells = corner[4 : cell * count : cell, 4 : cell * count : cell]
    assert (cells[np.eye(count, dtype=bool)] == cells[0, 0]).all()
    assert (cells[~np.eye(count, dtype=bool)] == 3 * 255).all()
    assert cells[0, 0] < 3 * 255


def test_a_small_confusion_is_wide_enough_for_its_note():
    small, large = (visualize.confusion_picture(np.eye(count), ["a"] * count) for count in (1, 12))
    assert np.array_equal(small[:18, :250], large[:18, :250])


def test_stacked_pictures_keep_their_pixels_on_white():
    small, large = np.zeros((2, 3, 3), np.uint8), np.zeros((1, 5, 3), np.uint8)
    picture = visualize.stack([small, large])
    assert picture.shape == (3, 5, 3)
    assert (picture[:2, 3:] == 255).all()
