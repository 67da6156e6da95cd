"""The benchmark measures like with like, and its tables hold ratios."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import REPO
from tools import baselines
from tools.benchmark import Ratio, take_turns
from tools.benchmark_scaling import tree_of
from utils.decode import DECODERS
from utils.losses import LOSSES
from utils.metrics import LevelScores


@pytest.fixture
def batch(tree):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tree.num_nodes, 24, 20, generator=generator)
    labels = torch.randint(0, tree.num_leaves, (2, 24, 20), generator=generator, dtype=torch.uint8)
    labels[:, :3] = tree.ignore_index
    return logits, labels


@pytest.mark.parametrize("name", ["bce", "tree_min"])
def test_plain_losses_equal_the_fast_ones(batch, tree, name):
    logits, labels = batch
    gradients = []
    for loss in (getattr(baselines, name), LOSSES[name]):
        z = logits.clone().requires_grad_()
        value = loss(z, labels, tree)
        value.backward()
        gradients.append((value.detach(), z.grad))
    (plain, plain_grad), (fast, fast_grad) = gradients
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_grad, fast_grad, rtol=1e-3, atol=1e-6)


def test_plain_scores_equal_the_fast_ones(batch, tree):
    logits, labels = batch
    leaf = baselines.decode(logits, tree)
    assert torch.equal(leaf, DECODERS["prob_sum"](logits, tree).long())
    plain, fast = baselines.Scores(tree), LevelScores(tree)
    plain.update(leaf, labels, logits)
    fast.update(leaf, labels, logits)
    result = fast.compute()
    for level, record in enumerate(result["levels"]):
        for node in tree.level_classes[level]:
            assert plain.ious()[level, node] == record["IoU"][tree.names[node]]
    pairs = int((labels != tree.ignore_index).sum()) * len(tree.edges)
    assert plain.violations / pairs == result["violation_rate"]


def test_the_plain_encoding_equals_the_targets(batch, tree):
    labels = batch[1][0]
    planes = baselines.encode_mask(labels.numpy(), tree)
    assert np.array_equal(planes, tree.encode(labels)[0].permute(1, 2, 0).numpy().astype(bool))


def test_contestants_take_turns_after_a_round_that_is_not_counted():
    order = []
    runners = {name: lambda name=name: order.append(name) for name in "abc"}
    costs = take_turns(runners, rounds=3)
    assert [len(costs[name]) for name in "abc"] == [3, 3, 3]
    rounds = ["".join(order[i : i + 3]) for i in range(3, 12, 3)]
    assert rounds == ["abc", "bca", "cab"]


def test_a_ratio_is_taken_within_rounds():
    ratio = Ratio.of([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize("nodes", [10, 27, 200])
def test_trees_of_any_size_can_be_made(nodes):
    tree = tree_of(nodes)
    assert tree.num_nodes == nodes
    assert tree.leaves == tuple(range(tree.num_leaves))


def test_quick_stages_run_and_write_ratios_and_a_trace(tmp_path):
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    stages = ["encode", "load", "bce", "tree_min", "scores", "evaluation", "network"]
    command = [sys.executable, "tools/benchmark.py", "--quick", "--threads", "1", "--device", "cpu", "--json", str(out)]
    done = subprocess.run(
        [*command, "--profile", str(traces), "--only", *stages], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert {stage["name"] for stage in record["stages"]} == set(stages)
    for stage in record["stages"]:
        assert 0 < stage["ratio"]["low"] <= stage["ratio"]["median"] <= stage["ratio"]["high"]
        assert stage["stage"] in done.stdout
    assert record["environment"]["hardware"]
    assert json.loads((traces / "train_step.pt.trace.json").read_text())["traceEvents"]
