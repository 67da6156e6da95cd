"""torchvision's ResNets as encoders: five feature maps instead of one class."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

WEIGHTS = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V2,
    "resnet101": torchvision.models.ResNet101_Weights.IMAGENET1K_V2,
    "resnet152": torchvision.models.ResNet152_Weights.IMAGENET1K_V2,
}


class ResNetEncoder(nn.Module):
    """A torchvision ResNet without its average pool and classifier.

    `channels` and `strides` describe the five feature maps, finest first; any decoder can be built from them.
    """

    strides = (2, 4, 8, 16, 32)

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in WEIGHTS:
            raise ValueError(f"unknown encoder {name!r}; expected one of {', '.join(WEIGHTS)}")
        resnet = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4
        widths = [stage[-1].bn3 if hasattr(stage[-1], "bn3") else stage[-1].bn2 for stage in self._stages()]
        self.channels = (self.conv1.out_channels, *(norm.num_features for norm in widths))

    def _stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: (B, 3, H, W) -> five maps (B, channels[i], H / strides[i], W / strides[i])."""
        x = self.relu(self.bn1(self.conv1(images)))
        features = [x]
        x = self.maxpool(x)
        for stage in self._stages():
            x = stage(x)
            features.append(x)
        return features

    def load_imagenet(self, name: str) -> None:
        """Loads torchvision's ImageNet weights, from its cache or the network.

        Raises: RuntimeError that says what to do when they cannot be had.
        """
        try:
            state = WEIGHTS[name].get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # whatever the network raises
            raise RuntimeError(
                f"the ImageNet weights of {name} cannot be downloaded from {WEIGHTS[name].url} ({error}). "
                f"Fetch that file on another machine and put it into {torch.hub.get_dir()}/checkpoints, or name it as "
                "encoder_weights with pretrained false, or train from scratch with pretrained false"
            ) from None
        self.load_state(state, f"torchvision's weights of {name}")

    def load_file(self, path: str | Path) -> None:
        """Loads a state dict of a torchvision ResNet, or of this encoder; the classifier in it is left aside.

        Raises: RuntimeError that names the file and what does not fit.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RuntimeError(f"{path}: no such file of encoder weights") from None
        except Exception as error:  # a damaged or foreign file can raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RuntimeError(f"{path}: not a state dict that can be loaded safely ({reason})") from None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise RuntimeError(f"{path}: expected a state dict (name -> tensor) of a torchvision ResNet")
        self.load_state(state, str(path))

    def load_state(self, state: dict[str, Tensor], source: str) -> None:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        own = self.state_dict()
        missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
        if missing or foreign or wrong:
            raise RuntimeError(
                f"{source}: does not fit this encoder ({len(missing)} tensors missing, {len(foreign)} unknown, "
                f"{len(wrong)} of another shape; the first: {(missing + foreign + wrong)[0]})"
            )
        self.load_state_dict(state)
