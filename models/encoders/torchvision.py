"""torchvision's classification networks as encoders: feature maps instead of one class."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.encoders.weights import fit_state, read_state

# what stands after the last feature map; of Swin the maps are taken before its last norm
HEADS = ("norm", "permute", "avgpool", "flatten", "classifier", "fc", "head", "heads")
CONTAINERS = ("features", "layers", "trunk_output")  # their children are steps of their own
DO_NOT_FIT = ("alexnet", "googlenet", "inception", "maxvit", "squeezenet", "vit")  # maps at other sizes, or none


def names() -> list[str]:
    """The networks that can be an encoder."""
    every = torchvision.models.list_models(module=torchvision.models)
    return [name for name in every if not name.startswith(DO_NOT_FIT)]


def listing() -> list[str]:
    """A line for each network: its name, millions of parameters as a classifier, and where its weights are."""
    lines, cache = [], Path(torch.hub.get_dir()) / "checkpoints"
    for name in names():
        weights = torchvision.models.get_model_weights(name).DEFAULT
        place = "here" if (cache / Path(weights.url).name).is_file() else "to be downloaded"
        lines.append(f"{name:<20}{weights.meta['num_params'] / 1e6:7.1f} M   weights {place}")
    return lines


class TorchvisionEncoder(nn.Module):
    """The steps of a network up to its last feature map, under the names that they have there.

    At each stride the last step's output is a map: what is deepest at that size. A last convolution of 1 x 1, which
    only widens the features for the classifier, is left out.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in names():
            known = "`python configs/config.py --encoders` lists torchvision's; any of timm is named timm:NAME"
            raise ValueError(f"unknown encoder {name!r}; {known}")
        self.name = name
        network = torchvision.models.get_model(name, weights=None)
        self.is_channels_last = isinstance(network, torchvision.models.SwinTransformer)
        steps = []  # the names of the modules that are called one after the other
        for child, module in network.named_children():
            if child in HEADS:
                break
            self.add_module(child, module)
            steps += [f"{child}.{inner}" for inner, _ in module.named_children()] if child in CONTAINERS else [child]
        self.steps = _without_widening(self, steps)
        for step in reversed(steps[len(self.steps) :]):  # what is left out holds no weights either
            container, _, child = step.rpartition(".")
            delattr(self.get_submodule(container), child)
        self.taken, self.channels = self._find_maps()
        self.weights = torchvision.models.get_model_weights(name).DEFAULT
        transforms = self.weights.transforms()
        self.mean, self.std = tuple(transforms.mean), tuple(transforms.std)

    def _find_maps(self) -> tuple[tuple[str, ...], dict[int, int]]:
        """The steps whose outputs are maps, and stride -> channels, found by sending a small photo through."""
        side, last, channels = 64, {}, {}
        x = torch.zeros(1, 3, side, side)
        with torch.no_grad():
            self.eval()
            for step in self.steps:
                x = self.get_submodule(step)(x)
                shape = x.movedim(-1, 1).shape if self.is_channels_last else x.shape
                stride = side // shape[2]
                last[stride], channels[stride] = step, shape[1]
        self.train()
        strides = [stride for stride in sorted(last) if stride > 1]
        return tuple(last[stride] for stride in strides), {stride: channels[stride] for stride in strides}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: (B, 3, H, W) normalised -> maps (B, channels[s], H / s, W / s), one a stride s, finest first."""
        x, maps = images, []
        for step in self.steps:
            x = self.get_submodule(step)(x)
            if step in self.taken:
                maps.append(x.permute(0, 3, 1, 2) if self.is_channels_last else x)
        return maps

    def load_pretrained(self) -> None:
        """Loads the network's own default weights, from torch's cache or the network.

        Raises: RuntimeError that says what to do when they cannot be had.
        """
        try:
            state = self.weights.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # whatever the network raises
            raise RuntimeError(
                f"the weights of {self.name} cannot be downloaded from {self.weights.url} ({error}). "
                f"Fetch that file on another machine and put it into {torch.hub.get_dir()}/checkpoints, or name it as "
                "encoder_weights with pretrained false, or train from scratch with pretrained false"
            ) from None
        self.load_state_dict(fit_state(state, self, f"torchvision's weights of {self.name}")[0])

    def load_file(self, path) -> list[str]:
        """Loads a state dict, as people have them; returns the keys that were left over.

        Raises: RuntimeError that names the file and what does not fit.
        """
        state, left_over = fit_state(read_state(path), self, str(path))
        self.load_state_dict(state)
        return left_over


def _without_widening(encoder: nn.Module, steps: list[str]) -> list[str]:
    """Without the last step that has weights, and what follows it, where that is a convolution of 1 x 1."""
    weighted = [i for i, step in enumerate(steps) if any(p.ndim > 1 for p in encoder.get_submodule(step).parameters())]
    inside = [*encoder.get_submodule(steps[weighted[-1]]).modules()]
    kernels = {module.kernel_size for module in inside if isinstance(module, nn.Conv2d)}
    only_widens = kernels == {(1, 1)} and not any(isinstance(module, nn.Linear) for module in inside)
    return steps[: weighted[-1]] if only_widens else steps
