"""The network: shapes for any input, gradients, and weights from files."""

import contextlib
import weakref

import pytest
import torch
import torchvision
from torchvision.models._api import WeightsEnum

from models.decoders import unet
from models.encoders.resnet import ResNetEncoder
from models.hseg import HSEG
from models.memory import recomputed

SLIM = (8, 8, 8, 8, 8)
BASIC, BOTTLENECK = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)
CHANNELS = {
    "resnet18": BASIC,
    "resnet34": BASIC,
    "resnet50": BOTTLENECK,
    "resnet101": BOTTLENECK,
    "resnet152": BOTTLENECK,
}


@pytest.fixture(scope="module")
def network() -> HSEG:
    torch.manual_seed(0)
    return HSEG("resnet18", 10, decoder_channels=SLIM)


@pytest.fixture(scope="module")
def resnet18_state() -> dict:
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()  # with its fc


@pytest.mark.parametrize("name", CHANNELS)
def test_each_encoder_fits_the_decoder(name):
    with torch.device("meta"):  # shapes without arithmetic
        encoder, whole = ResNetEncoder(name), HSEG(name, 7, decoder_channels=SLIM)
        images = torch.empty(2, 3, 64, 96)
    assert encoder.channels == CHANNELS[name]
    maps = encoder(images)
    expected = [(2, c, 64 // s, 96 // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    assert whole(images).shape == (2, 7, 64, 96)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32), (95, 101)])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_size_from_the_stride_on_keeps_its_shape(network, size, batch):
    assert network.eval()(torch.zeros(batch, 3, *size)).shape == (batch, 10, *size)


def test_a_smaller_image_is_refused_with_the_way_out(network):
    with pytest.raises(ValueError, match="enlarge it to 32 x 32"):
        network(torch.zeros(1, 3, 31, 64))


def test_padding_changes_nothing_far_from_it(network):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    padded = torch.nn.functional.pad(images[..., :60], (0, 4, 0, 0), mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images[..., :60]), network.eval()(padded)[..., :60])


def test_gradients_reach_every_parameter(network):
    network.train()
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    network.zero_grad()
    assert not without


def test_scores_are_the_sigmoid_of_the_logits(network):
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(network.eval().scores(images), network.eval()(images).sigmoid())


def test_an_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="unknown encoder 'resnet19'; expected one of resnet18"):
        HSEG("resnet19", 10)


def test_encoder_weights_come_from_a_file_and_the_classifier_is_left_aside(tmp_path, resnet18_state):
    torch.save(resnet18_state, tmp_path / "weights.pth")
    encoder = HSEG("resnet18", 4, encoder_weights=tmp_path / "weights.pth", decoder_channels=SLIM).encoder
    assert all(torch.equal(value, resnet18_state[key]) for key, value in encoder.state_dict().items())


def test_an_encoder_saved_on_its_own_can_be_loaded_again(tmp_path, network):
    torch.save(network.encoder.state_dict(), tmp_path / "weights.pth")
    other = HSEG("resnet18", 10, encoder_weights=tmp_path / "weights.pth", decoder_channels=SLIM)
    assert torch.equal(other.encoder.conv1.weight, network.encoder.conv1.weight)


class Foreign:
    """Something that would have to be executed to be loaded."""


def less_one(state):
    return {key: value for key, value in state.items() if key != "bn1.bias"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (less_one, "1 tensors missing, 0 unknown, 0 of another shape; the first: bn1.bias"),
        (lambda s: s | {"head.weight": torch.ones(1)}, "0 tensors missing, 1 unknown.*the first: head.weight"),
        (lambda s: s | {"conv1.weight": torch.ones(64, 1, 7, 7)}, "1 of another shape; the first: conv1.weight"),
        (lambda s: list(s.values()), "expected a state dict"),
        (lambda s: {"model": s}, "expected a state dict"),
        (lambda s: Foreign(), "not a state dict that can be loaded safely"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, resnet18_state, content, message):
    torch.save(content(resnet18_state), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=f"weights.pth: .*{message}"):
        ResNetEncoder("resnet18").load_file(tmp_path / "weights.pth")


def test_the_weights_of_a_deeper_encoder_are_refused(tmp_path):
    with torch.device("meta"):
        state = torchvision.models.resnet34().state_dict()
    with pytest.raises(RuntimeError, match="file: does not fit this encoder"):
        ResNetEncoder("resnet18").load_state(state, "file")


def test_a_missing_or_garbled_file_is_named(tmp_path):
    (tmp_path / "garbled.pth").write_bytes(b"not weights")
    with pytest.raises(RuntimeError, match=r"garbled.pth: not a state dict"):
        ResNetEncoder("resnet18").load_file(tmp_path / "garbled.pth")
    with pytest.raises(RuntimeError, match=r"absent.pth: no such file of encoder weights"):
        ResNetEncoder("resnet18").load_file(tmp_path / "absent.pth")


def test_imagenet_weights_are_loaded_into_the_encoder(monkeypatch, resnet18_state):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: resnet18_state)
    encoder = HSEG("resnet18", 4, pretrained=True, decoder_channels=SLIM).encoder
    assert torch.equal(encoder.conv1.weight, resnet18_state["conv1.weight"])


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(RuntimeError) as error:
        HSEG("resnet18", 4, pretrained=True, decoder_channels=SLIM)
    for part in ("resnet18", "https://", "no route to host", "checkpoints", "encoder_weights", "pretrained false"):
        assert part in str(error.value)


def gradients(network: HSEG, amp: bool) -> list[torch.Tensor]:
    """Of a sum with different weights at every pixel, after one pass in training mode."""
    network.train().zero_grad()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        logits = network(images)
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("amp", [False, True])
def test_joining_again_gives_the_same_bits(network, monkeypatch, amp):
    ours = gradients(network, amp)
    monkeypatch.setattr(unet, "recomputed", lambda *_: contextlib.nullcontext())
    assert all(map(torch.equal, ours, gradients(network, amp)))


def test_joined_maps_are_not_kept_for_the_backward_pass(network, monkeypatch):
    joined, join = [], unet.join

    def watched(x, skip):
        result = join(x, skip)
        joined.append(weakref.ref(result))
        return result

    monkeypatch.setattr(unet, "join", watched)
    logits = network.train()(torch.rand(1, 3, 64, 64))
    assert len(joined) == 4
    assert not any(ref() is not None for ref in joined)
    logits.sum().backward()
    assert len(joined) == 8  # each once more, for the backward pass


def test_recomputed_keeps_what_it_does_not_know():
    a, b = (torch.rand(3, requires_grad=True) for _ in range(2))
    result = a * 2
    with recomputed(result, lambda a: a * 2, a):
        total = (result * result + b * b).sum()
    total.backward()
    assert torch.equal(a.grad, 8 * a.detach())
    assert torch.equal(b.grad, 2 * b.detach())
