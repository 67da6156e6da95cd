"""The network: maps of any encoder, shapes for any photo, gradients, normalisation, and weights as people have them."""

import re

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from models.decoders.unet import LastStage
from models.encoders import build_encoder
from models.encoders.torchvision import TorchvisionEncoder
from models.hseg import HSEG

SLIM = (8, 8, 8, 8, 8)
# name -> channels by stride, as torchvision's papers and code have them
FAMILIES = {
    "resnet18": {2: 64, 4: 64, 8: 128, 16: 256, 32: 512},
    "mobilenet_v2": {2: 16, 4: 24, 8: 32, 16: 96, 32: 320},
    "mobilenet_v3_small": {2: 16, 4: 16, 8: 24, 16: 48, 32: 96},
    "efficientnet_b0": {2: 16, 4: 24, 8: 40, 16: 112, 32: 320},
    "convnext_tiny": {4: 96, 8: 192, 16: 384, 32: 768},
    "regnet_y_400mf": {2: 32, 4: 48, 8: 104, 16: 208, 32: 440},
    "shufflenet_v2_x0_5": {2: 24, 4: 24, 8: 48, 16: 96, 32: 192},
    "densenet121": {2: 64, 4: 256, 8: 512, 16: 1024, 32: 1024},
    "vgg11_bn": {2: 128, 4: 256, 8: 512, 16: 512, 32: 512},
    "swin_t": {4: 96, 8: 192, 16: 384, 32: 768},
}


@pytest.fixture(scope="module")
def network() -> HSEG:
    torch.manual_seed(0)
    return HSEG("resnet18", 10, decoder_channels=SLIM)


@pytest.fixture(scope="module")
def resnet18_state() -> dict:
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()  # with its fc


# --- encoders ---
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gives_its_maps_and_a_gradient_at_odd_sizes_of_photos_normalised_as_its_weights_expect(name):
    torch.manual_seed(0)
    network = HSEG(name, 7, decoder_channels=SLIM)
    assert network.encoder.channels == FAMILIES[name]
    maps = network.encoder(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for s, c in FAMILIES[name].items()]
    photos = torch.randint(0, 256, (2, 3, 45, 67), dtype=torch.uint8)
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transforms.mean, transforms.std))
    torch.testing.assert_close(network.normalise(photos), (photos / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    logits = network(photos)
    assert logits.shape == (2, 7, 45, 67)
    logits.square().mean().backward()
    unused = [key for key, p in network.named_parameters() if p.grad is None]
    assert not unused


NODES = {  # the maps in torchvision's own network
    "resnet18": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13", "features.17"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
}


@pytest.mark.parametrize("name", NODES)
def test_maps_are_torchvisions_own_intermediate_values(name):
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name, weights=None).eval()
    encoder = TorchvisionEncoder(name).eval()
    encoder.load_state_dict({key: value for key, value in whole.state_dict().items() if key in encoder.state_dict()})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = create_feature_extractor(whole, NODES[name])(images)
        for ours, node in zip(encoder(images), NODES[name], strict=True):
            torch.testing.assert_close(ours, theirs[node], rtol=0, atol=0)


def test_a_timm_network_is_an_encoder_with_its_own_normalisation_and_takes_the_state_dict_of_the_whole(tmp_path):
    timm = pytest.importorskip("timm")
    network = HSEG("timm:tf_efficientnet_lite0", 5, decoder_channels=SLIM)
    assert network.encoder.channels == {2: 16, 4: 24, 8: 40, 16: 112, 32: 320}
    assert network.input_mean.tolist() == [0.5, 0.5, 0.5]
    assert network(torch.zeros(1, 3, 45, 67)).shape == (1, 5, 45, 67)
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(whole, tmp_path / "w.pth")
    assert network.encoder.load_file(tmp_path / "w.pth") == ["classifier.weight", "classifier.bias"]
    assert all(torch.equal(value, whole[key]) for key, value in network.encoder.network.state_dict().items())


def test_a_missing_timm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(RuntimeError, match=r"pip install -r requirements-timm\.txt"):
        HSEG("timm:resnet18", 3)


@pytest.mark.parametrize("name", ["resnet19", "vit_b_16", "alexnet"])
def test_an_encoder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"unknown encoder '{name}'"):
        HSEG(name, 10)


def test_a_depthwise_convolution_with_a_stride_stays_in_float32_under_bf16():
    layer, x = build_encoder("mobilenet_v2").features[2].conv[1][0], torch.randn(1, 96, 8, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), exact, rtol=0, atol=0)


# --- the whole network ---
def test_any_size_from_the_stride_on_keeps_its_shape_and_bytes_are_as_good_as_floats(network):
    for size in ((32, 32), (33, 47), (95, 101)):
        photos = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            logits = network.eval()(photos)
            assert logits.shape == (2, 10, *size)
            assert torch.equal(network.scores(photos.float()), logits.sigmoid())
    with pytest.raises(ValueError, match="enlarge it to 32 x 32"):
        network(torch.zeros(1, 3, 31, 64))


def test_the_last_stage_goes_up_without_a_comb():
    """A ramp of features is a ramp at full resolution: no steps every two pixels."""
    last = LastStage(1, 1)
    last.block = torch.nn.Identity()
    row = last(torch.arange(8.0).expand(1, 1, 8, 8))[0, 0, 0]
    torch.testing.assert_close(row[1:-1].diff(), torch.full((13,), 0.5))


def test_a_checkpoint_of_the_first_version_keeps_its_last_stage():
    old = HSEG("resnet18", 4, decoder_channels=SLIM, subpixel=True)
    assert old.state_dict()["decoder.last.block.0.weight"].shape == (32, 8, 1, 1)
    assert old(torch.zeros(2, 3, 64, 64)).shape == (2, 4, 64, 64)


# --- weights as people have them ---
def without_counters(state: dict) -> dict:
    """As torchvision's older files are: 102 tensors of ResNet-18's 122."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


SPELLINGS = {
    "torchvision": lambda s: s,
    "torchvision, older": without_counters,
    "DataParallel": lambda s: prefixed(s, "module."),
    "lightning": lambda s: {"state_dict": prefixed(without_counters(s), "model.encoder."), "epoch": 3},
    "a segmentation network": lambda s: prefixed(s, "encoder.") | {"decoder.head.weight": torch.ones(2)},
    "moco": lambda s: {"model": prefixed(s, "module.backbone.")},
}


@pytest.mark.parametrize("content", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_spelling_of_a_state_dict_is_understood(tmp_path, resnet18_state, content, suffix):
    file, state = tmp_path / f"weights{suffix}", content(resnet18_state)
    if suffix == ".pth":
        torch.save(state, file)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(state.get("model", state.get("state_dict", state)), file)
    encoder = build_encoder("resnet18")
    left_over = encoder.load_file(file)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, resnet18_state[key]), key
    assert [key for key in left_over if key.endswith("fc.weight")], "the classifier is left over, and named"


class Foreign:
    """Something that would have to be executed to be loaded."""


MISFITS = {
    "1 of its 120 tensors are missing, 0 have another shape: bn1.bias is missing": lambda s: (
        s.pop("bn1.bias") is None or s
    ),
    "1 have another shape: conv1.weight is (64, 1, 7, 7)": lambda s: s | {"conv1.weight": torch.ones(64, 1, 7, 7)},
    "expected a state dict": lambda _: {"net": {}},
    "not a state dict that can be loaded safely": lambda _: Foreign(),
    "conv1.weight is missing); the file begins with a": lambda _: {"a": torch.ones(1)},
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, resnet18_state, message):
    torch.save(MISFITS[message](dict(resnet18_state)), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=f"weights.pth: .*{re.escape(message)}"):
        build_encoder("resnet18").load_file(tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_or_garbled_file_is_named(tmp_path, suffix):
    (tmp_path / f"garbled{suffix}").write_bytes(b"not weights")
    for name in (f"garbled{suffix}: ", f"absent{suffix}: no such file of encoder weights"):
        with pytest.raises(RuntimeError, match=name):
            build_encoder("resnet18").load_file(tmp_path / name.split(":")[0])


@pytest.mark.parametrize("name", ["mobilenet_v2", "tf_efficientnet_lite0"])
def test_real_imagenet_weights_fit(hseg_weights, name):
    encoder = build_encoder(name if name == "mobilenet_v2" else f"timm:{name}")
    before = {key: value.clone() for key, value in encoder.state_dict().items() if value.ndim > 1}
    encoder.load_file(hseg_weights / f"{name}_imagenet.pth")
    assert not any(torch.equal(value, encoder.state_dict()[key]) for key, value in before.items())
