"""Losses: worked numbers, facts from the formulas, extreme inputs. Random trees are in test_properties.py."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.config import CRITERIA, DECODE_RULES, Config, default_decode
from utils.decode import DECODERS
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.losses import LOSSES, build_criterion

NAMES = sorted(LOSSES)
NAMES_AND_GAMMAS = [(name, gamma) for name in NAMES for gamma in ((0.0, 0.5, 2.0) if "focal" in name else (2.0,))]
HEAD, UPPER, BODY, VOID = 4, 8, 7, 255


def random_case(h: Hierarchy, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (2, N, 3, 4) and labels at any depth, some void."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, h.num_nodes, 3, 4, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, h.num_nodes + 1, (2, 3, 4), generator=generator)
    return logits.to(dtype), labels.masked_fill(labels == h.num_nodes, h.ignore_index)


def value_and_grad(name: str, logits: Tensor, labels: Tensor, h: Hierarchy, **more: object) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = LOSSES[name](logits, labels, h, **more)
    value.backward()
    return value.detach(), logits.grad


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def head_pixel() -> tuple[Tensor, Tensor]:
    """The worked pixel: a head with logits head 2, upper_body 1, body -1, all others -3."""
    logits = torch.full((1, 10, 1, 1), -3.0, dtype=torch.float64)
    logits[0, [HEAD, UPPER, BODY], 0, 0] = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    return logits, torch.tensor([[[HEAD]]])


def test_bce_of_the_worked_pixel(h: Hierarchy) -> None:
    value, grad = value_and_grad("bce", *head_pixel(), h)
    assert value.item() == pytest.approx(softplus(-2) + softplus(-1) + softplus(1) + 7 * softplus(-3))
    assert grad[0, HEAD, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)) - 1)


def test_tree_min_of_the_worked_pixel_sends_all_positive_gradient_to_body(h: Hierarchy) -> None:
    value, grad = value_and_grad("tree_min", *head_pixel(), h)
    assert value.item() == pytest.approx(3 * softplus(1) + 7 * softplus(-3))
    assert grad[0, [HEAD, UPPER], 0, 0].tolist() == [0, 0]
    assert grad[0, BODY, 0, 0].item() == pytest.approx(-3 / (1 + math.exp(-1)))


@pytest.mark.parametrize(("name", "gamma"), NAMES_AND_GAMMAS)
def test_extreme_logits_stay_finite(name: str, gamma: float, h: Hierarchy) -> None:
    _, labels = random_case(h)
    signs = torch.randint(-1, 2, (2, 10, 3, 4), generator=torch.Generator().manual_seed(2))
    for dtype, size in itertools.product((torch.float32, torch.bfloat16, torch.float16), (0.0, 30.0, 100.0, 1e4)):
        for logits in (torch.full((2, 10, 3, 4), size), torch.full((2, 10, 3, 4), -size), signs * size):
            value, grad = value_and_grad(name, logits.to(dtype), labels, h, gamma=gamma)
            assert 0 <= value < math.inf
            assert grad.isfinite().all()
            assert (value.dtype, grad.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_float32_and_labels_of_any_integer_type_stay_as_they_are(name, half, h) -> None:
    logits, labels = random_case(h, half)
    exact, exact_grad = value_and_grad(name, logits.float(), labels, h, gamma=0.5)
    for dtype in (torch.uint8, torch.int32):
        typed = labels.to(dtype)
        with torch.autocast("cpu", dtype=half):
            value, grad = value_and_grad(name, logits, typed, h, gamma=0.5)
        torch.testing.assert_close(value, exact)
        torch.testing.assert_close(grad, exact_grad.to(half), rtol=0.01, atol=1e-6)
        assert torch.equal(typed, labels.to(dtype))


def test_a_sum_of_losses_is_the_weighted_sum(h: Hierarchy) -> None:
    logits, labels = random_case(h)
    spec = {"tree_min": 1.0, "bce": 0.5, "ce": 2}
    parts = [weight * LOSSES[name](logits, labels, h) for name, weight in spec.items()]
    torch.testing.assert_close(build_criterion(spec, h)(logits, labels), sum(parts))


@pytest.mark.parametrize("spec", ["tree_mim", {"bce": 0}, {"bce": math.inf}])
def test_a_wrong_criterion_is_refused_and_shapes_that_do_not_fit(spec: object, h: Hierarchy) -> None:
    with pytest.raises(UserError, match=r"criterion: '.*expected a weight above 0, of one of bce, tree_min"):
        build_criterion(spec, h)
    logits, labels = random_case(h)
    for bad_logits, bad_labels in ((logits[:, :7], labels), (logits, labels[:1]), (logits, labels[..., :2])):
        with pytest.raises(ValueError, match="do not fit"):
            LOSSES["bce"](bad_logits, bad_labels, h)


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += 1
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("name", "most"), [("bce", 40), ("tree_min", 250), ("ce", 60)])
def test_forward_and_backward_are_few_operations(name: str, most: int, h: Hierarchy) -> None:
    """On a GPU each operation is a launch."""
    logits, labels = random_case(h, torch.float32)
    logits.requires_grad_()
    LOSSES[name](logits, labels, h)  # makes the tables
    with CountOperations() as operations:
        LOSSES[name](logits, labels, h).backward()
    assert 10 < operations.count <= most


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_criterion_is_one_graph_with_the_same_bits(name: str, h: Hierarchy, monkeypatch) -> None:
    compile_function = torch.compile
    # the eager backend captures the graph like any other and needs no C++ compiler
    monkeypatch.setattr(torch, "compile", lambda function, **more: compile_function(function, backend="eager", **more))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logits, labels = random_case(h, torch.float32)
    logits.requires_grad_()
    plain, compiled = (build_criterion(name, h, 2.0, compile=compile) for compile in (False, True))
    for _ in range(3):
        assert torch.equal(compiled(logits, labels), plain(logits, labels))
    seen = torch._dynamo.utils.counters
    assert seen["stats"]["unique_graphs"] == 1, "compiled once, and used"
    assert not seen["graph_break"]
    with torch.no_grad():
        compiled(logits[..., :2], labels[..., :2])  # a photo of another size in validation
    assert seen["stats"]["unique_graphs"] == 1
    with pytest.raises(UserError, match=r"labels hold \[77\]"):
        compiled(logits, torch.full_like(labels, 77))


def test_the_config_knows_every_loss_and_rule() -> None:
    assert set(CRITERIA) == set(LOSSES)
    assert set(DECODE_RULES) == set(DECODERS) >= set(CRITERIA.values())
    assert default_decode({"bce": 0.5, "ce": 2.0}) == Config(criterion="ce").decode_rule == "mass"
    assert Config(criterion="ce", decode="leaf").decode_rule == "leaf"
