"""Comparing experiments: statistics against loops and hand values, what is refused, what the reports say."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.config import Config, save_config
from manage.comparison import Comparison, Difference, allow_for_many, bootstrap, compare, load_experiment
from manage.tables import summary
from tests.factory import REPO
from tools import compare as tool
from utils.errors import UserError
from utils.files import write_json
from utils.hierarchy import Hierarchy
from utils.metrics import scores_from_confusion

PHOTOS, SUM = 40, {"tree_min": 1.0, "bce": 0.5}
ENVIRONMENT = {"commit": "abc", "hardware": "a machine"}
OTHER_TREE = Hierarchy.load(REPO / "configs" / "hierarchies" / "synthetic_deep.json").to_dict()


def fake_matrices(h: Hierarchy, quality: float, seed: int) -> np.ndarray:
    """Confusion matrices of photos with fixed labels, `quality` of which are predicted right."""
    labels = np.random.default_rng(7).integers(0, h.num_leaves, size=(PHOTOS, 300))
    generator = np.random.default_rng(seed + 100)
    wrong = generator.integers(0, h.num_leaves, size=labels.shape)
    answer = np.where(generator.random(labels.shape) < quality, labels, wrong)
    matrices = np.zeros((PHOTOS, h.num_nodes, h.num_nodes), dtype=np.int32)
    for photo in range(PHOTOS):
        np.add.at(matrices[photo], (labels[photo], answer[photo]), 1)
    return matrices


def fake_experiment(
    root: Path, h: Hierarchy, name: str, quality: float, seed: int = 0, evaluation: str = "best", **keys
) -> Path:
    """An experiment's folder as train.py and evaluate.py leave it."""
    config = Config(exp_name=name, seed=seed, root_dir=str(root), n_epochs=3, **keys)
    folder, scored = config.experiment_dir, config.experiment_dir / "evaluation" / evaluation
    scored.mkdir(parents=True)
    save_config(config, folder / "configs" / f"{name}.json")
    matrices = fake_matrices(h, quality, seed)
    ids = np.array([f"photo{i}" for i in range(PHOTOS)])
    np.savez_compressed(scored / "photos.npz", ids=ids, logit_sum=matrices, leaf=matrices)
    result = scores_from_confusion(torch.from_numpy(matrices.sum(0, dtype=np.int64)), h) | {"violation_rate": 0.01}
    record = {"checkpoint": f"{evaluation}.pt", "epoch": 3, "decode": "logit_sum", "root_bias": {}, "tta": "off"} | {
        "scores": summary(result),
        "levels": result["levels"],
        "rules": {rule: summary(result) for rule in ("logit_sum", "leaf")},
        "config": config.to_dict(),
        "tree": h.to_dict(),
        "environment": ENVIRONMENT,
    }
    write_json(record, scored / "scores.json")
    write_json([ENVIRONMENT], folder / "environment.json")
    return folder


@pytest.fixture
def runs(tmp_path: Path, tree: Hierarchy) -> list[Path]:
    """Three seeds each of a weak and a good loss."""
    weak = [fake_experiment(tmp_path, tree, f"bce_seed{s}", 0.5, s) for s in range(3)]
    return weak + [fake_experiment(tmp_path, tree, f"sum_seed{s}", 0.6, s, criterion=SUM) for s in range(3)]


def compared(folders: list[Path], **options) -> Comparison:
    return compare([load_experiment(folder) for folder in folders], resamples=200, **options)


def test_a_bootstrap_equals_drawing_photos_in_a_loop(runs: list[Path], tree: Hierarchy) -> None:
    experiments = [load_experiment(folder) for folder in runs[:2]]
    draws = np.random.default_rng(1).multinomial(PHOTOS, [1 / PHOTOS] * PHOTOS, size=4)
    for drawn, scores in zip(draws, bootstrap(experiments, resamples=4, seed=1), strict=True):
        photos = [photo for photo, times in enumerate(drawn) for _ in range(times)]
        sums = [torch.from_numpy(sum(e.matrices[photo] for photo in photos)).long() for e in experiments]
        each = [scores_from_confusion(matrix, tree) for matrix in sums]
        expected = [np.mean([one[name] for one in each]) for name in ("mIoU1", "mIoU2", "mIoU3", "mistake_severity")]
        assert scores.tolist() == pytest.approx(expected)


def difference(value=0.02, low=0.01, high=0.03, seeds=(0.02, 0.02), photos=100, p=0.01, score="mIoU1") -> Difference:
    return Difference("a", "b", score, value, dict(enumerate(seeds)), photos, low, high, p)


def test_many_comparisons_are_allowed_for() -> None:
    """Holm by hand for p of 0.01, 0.6 and 0.02: times 3, 2 and 1, in their order; intervals leave out as little."""
    samples = [np.arange(-beyond, 999 - beyond) for beyond in (3, 298, 8)]
    adjusted = allow_for_many([(difference(), s) for s in samples])
    assert [d.p for d in adjusted] == pytest.approx([0.03, 0.6, 0.04])
    for d, s, doubt in zip(adjusted, samples, (5 / 3, 5, 5 / 2), strict=True):
        assert (d.low, d.high) == pytest.approx(tuple(np.percentile(s, [doubt / 2, 100 - doubt / 2])))
        assert (d.low > 0) == (d.p < 0.05)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (difference(), "better"),
        (difference(-0.02, -0.03, -0.01, [-0.02, -0.03], score="mistake_severity"), "better"),
        (difference(low=-0.01), "no evidence of a difference"),
        (difference(seeds=[0.06, -0.02]), "no evidence of a difference"),
        (difference(p=0.06), "no evidence of a difference"),
        (difference(photos=5), "too few photos to tell"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_seeds(given: Difference, verdict: str) -> None:
    assert given.verdict == verdict


def test_runs_that_differ_only_in_seed_form_a_group_which_may_be_named_and_repeats_do_not(runs, tmp_path, tree) -> None:
    comparison = compared(runs, names={"sum_seed0": "tree"})
    groups = [(group.label, [*group.values("mIoU1")]) for group in comparison.groups]
    assert groups == [("bce_seed0", [0, 1, 2]), ("tree", [0, 1, 2])]
    assert list(comparison.differing) == ["criterion"]
    assert [d.verdict for d in comparison.differences[:3]] == ["better"] * 3
    assert all(d.low < d.value < d.high for d in comparison.differences)
    again = fake_experiment(tmp_path, tree, "again", 0.5)
    assert [group.label for group in compared([runs[0], again]).groups] == ["bce_seed0", "again"]
    change_scores(again, tta="flip", config=load_experiment(runs[0]).record["config"] | {"seed": 7})
    assert compared([runs[0], again]).differing == {"tta": ["off", "flip"]}
    # batch_size is of each process, so with more of them the batches differ; an old run's records say nothing: one
    write_json([ENVIRONMENT | {"processes": 4}], runs[1] / "environment.json")
    (runs[0] / "environment.json").unlink()
    assert compared(runs[:3]).differing == {"processes": [[1], [4]]}


SCORED = Path("evaluation", "best")


def change_scores(folder: Path, **changes) -> None:
    path = folder / SCORED / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_photos(folder: Path, name: str, change) -> None:
    path = folder / SCORED / "photos.npz"
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays | {name: change(arrays[name])})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ours: shutil.rmtree(ours / SCORED), r"python evaluate.py --cfg .*bce_seed0.json --checkpoint best"),
        (shutil.rmtree, "no such experiment"),
        (lambda ours: (ours / SCORED / "photos.npz").write_bytes(b"PK"), r"photos.npz: damaged"),
        (lambda ours: change_scores(ours, decode="prob_sum"), "photos.npz: damaged .*prob_sum"),
        (lambda ours: change_scores(ours, tree=OTHER_TREE), "their trees differ"),
        (lambda ours: change_photos(ours, "ids", lambda ids: ids[::-1]), r"scored on other photos \(40 and 40\)"),
        (lambda ours: change_photos(ours, "logit_sum", lambda m: m.transpose(0, 2, 1)), "or labels; evaluate both"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: list[Path], spoil, message: str) -> None:
    spoil(runs[0])
    with pytest.raises(UserError, match=message):
        compared([runs[3], runs[0]])


def test_a_report_holds_the_scores_in_every_format_and_needs_no_other_file(tmp_path, runs, tree, monkeypatch, capsys):
    folders = [*runs, fake_experiment(tmp_path, tree, "ce", 0.55, criterion="ce")]
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, folders), "--out", str(tmp_path / "out")])
    tool.main()
    assert "no photos side by side" in capsys.readouterr().out  # there are no checkpoints here
    text, page, tex, record = ((tmp_path / f"out/comparison.{k}").read_text() for k in ("md", "html", "tex", "json"))
    own = [load_experiment(folder).record["scores"]["mIoU1"] for folder in runs[:3]]
    assert f" {100 * np.mean(own):.2f} ± {100 * np.std(own, ddof=1):.2f} |" in text
    assert re.search(r"\| sum_seed0 *\| *bce_seed0 \| +mIoU1 \(parts\) \| .* better \|", text)
    assert "hold for all 8 comparisons" in text
    assert "sum\\_seed0 & 3 & logit\\_sum & " in tex
    assert page.count("<table>") == len(re.findall(r"^\| -", text, re.MULTILINE)) == 8
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    groups = json.loads(record)["groups"]
    assert [[run["seed"] for run in members] for members in groups.values()] == [[0, 1, 2], [0, 1, 2], [0]]
