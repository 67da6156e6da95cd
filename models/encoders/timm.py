"""timm's networks as encoders, where the package timm is installed (requirements-timm.txt)."""

import torch
from torch import Tensor, nn

from models.encoders.weights import IMAGENET, fit_state, read_state


class TimmEncoder(nn.Module):
    """Any timm network with `features_only`, by timm's own name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = import_timm()
        if not timm.is_model(name):
            close = timm.list_models(f"*{name}*")[:3]
            raise ValueError(f"unknown encoder 'timm:{name}'" + (f"; timm has {', '.join(close)}" if close else ""))
        self.name = name
        try:
            self.network = create_maps(name)
            with torch.no_grad():
                self.network.eval()(torch.zeros(1, 3, 64, 96))
        except (RuntimeError, AttributeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"encoder 'timm:{name}' gives no feature maps of photos of any size ({error}); choose another"
            ) from None
        self.network.train()
        info = self.network.feature_info
        self.strides, self.is_channels_last = info.reduction(), getattr(self.network, "output_fmt", None) == "NHWC"
        self.channels = {s: c for s, c in zip(self.strides, info.channels(), strict=True) if s > 1}
        pretrained = timm.get_pretrained_cfg(name)
        self.mean, self.std = (pretrained.mean, pretrained.std) if pretrained else IMAGENET

    def forward(self, images: Tensor) -> list[Tensor]:
        """Shape: (B, 3, H, W) normalised -> maps (B, channels[s], H / s, W / s), one a stride s, finest first."""
        maps = [x for x, stride in zip(self.network(images), self.strides, strict=True) if stride > 1]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.is_channels_last else maps

    def load_pretrained(self) -> None:
        """Loads timm's own default weights. Raises: RuntimeError that says what to do when they cannot be had."""
        try:
            state = import_timm().create_model(self.name, pretrained=True).state_dict()
        except Exception as error:  # whatever the hub raises
            raise RuntimeError(
                f"the weights of timm:{self.name} cannot be had ({str(error).splitlines()[0]}). Fetch them on another "
                "machine and name the file as encoder_weights with pretrained false, or train from scratch"
            ) from None
        self._take(state)

    def load_file(self, path) -> list[str]:
        """Loads a state dict of the whole timm network; returns the keys that were left over.

        Raises: RuntimeError that names the file and what does not fit.
        """
        without_classifier = import_timm().create_model(self.name, num_classes=0)
        state, left_over = fit_state(read_state(path), without_classifier, str(path))
        self._take(state)
        return left_over

    def _take(self, state: dict[str, Tensor]) -> None:
        """timm itself maps names of the whole network to those of its feature extractor."""
        overlay = {"state_dict": state, "url": "", "hf_hub_id": None, "file": ""}
        loaded = create_maps(self.name, pretrained=True, pretrained_cfg_overlay=overlay)
        self.network.load_state_dict(loaded.state_dict())


def create_maps(name: str, **options) -> nn.Module:
    """timm's feature extractor; networks that check the size of photos are told not to."""
    try:
        return import_timm().create_model(name, features_only=True, strict_img_size=False, **options)
    except TypeError:  # most know no such option
        return import_timm().create_model(name, features_only=True, **options)


def import_timm():
    """Raises: RuntimeError that says how to install it."""
    try:
        import timm
    except ImportError:
        raise RuntimeError(
            "an encoder timm:NAME needs the package timm; install it: pip install -r requirements-timm.txt"
        ) from None
    return timm
