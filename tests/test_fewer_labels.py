"""Label maps for the question what few labelled leaves are worth."""

from pathlib import Path

from docs.figures import fewer_labels
from utils.encoding import load_encoding
from utils.hierarchy import Hierarchy
from utils.ids import read_ids
from utils.images import read_labels


def test_of_a_few_train_photos_the_leaves_stay_and_of_all_others_the_halves(
    tmp_path: Path, sample_data: Path, tree: Hierarchy, monkeypatch
) -> None:
    out = tmp_path / "fewer"
    options = ["--every", "4", "--out", str(out), f"root_data_dir={sample_data}"]
    monkeypatch.setattr("sys.argv", ["fewer_labels.py", *options])
    fewer_labels.main()
    train, val = (read_ids(sample_data / f"{split}_id.txt") for split in ("train", "val"))
    few = read_ids(out / "train_few.txt")
    assert few == train[::4]
    assert set(load_encoding(out / "labels", tree).files) == {*train, *val}
    for sample_id in (*train, *val):
        before, after = (
            read_labels(folder / f"{sample_id}.png") for folder in (sample_data / "gt_masks_hie", out / "labels")
        )
        keeps = sample_id in few or sample_id in val
        assert (after == (before if keeps else tree.level_of(before, 1))).all()
