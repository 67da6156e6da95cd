"""State dicts of encoders as people have them: wrapped, prefixed, with or without counters and classifier."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation, where weights name no others
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # names of torchvision's own files


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, out of any wrapper; nothing in it is executed.

    Raises: RuntimeError that names the file.
    """
    if not Path(path).is_file():
        raise RuntimeError(f"{path}: no such file of encoder weights")
    try:
        if str(path).endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise RuntimeError(f"{path}: needs the package safetensors; install it: pip install safetensors") from None
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"{path}: not a state dict that can be loaded safely ({reason})") from None
    while isinstance(state, Mapping) and (inner := [state[k] for k in WRAPPERS if isinstance(state.get(k), Mapping)]):
        state = inner[0]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise RuntimeError(f"{path}: expected a state dict (name -> tensor), or one inside {', '.join(WRAPPERS)}")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def fit_state(state: Mapping[str, Tensor], network: nn.Module, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that a network needs, and the keys that are left over, such as those of a classifier.

    A prefix that all the network's keys have in the file is taken away. Counters of batch normalisation, which older
    files lack, stay as they are.

    Raises: RuntimeError for a tensor that is missing or of another shape.
    """
    own = network.state_dict()
    renamed = {OLD_DENSENET.sub(r"\1\2.", key): key for key in state}
    first = next(iter(own))
    before = [key.removesuffix(first) for key in renamed if key.endswith(first)]
    prefix = max(before, key=lambda chain: sum(chain + key in renamed for key in own), default="")
    given = {key: state[renamed[prefix + key]] for key in own if prefix + key in renamed}
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    wrong = [key for key in given if given[key].shape != own[key].shape]
    if missing or wrong:
        fault = f"{missing[0]} is missing" if missing else f"{wrong[0]} is {tuple(given[wrong[0]].shape)}"
        raise RuntimeError(
            f"{source}: does not fit this encoder ({len(missing)} of its {len(own)} tensors are missing, {len(wrong)} "
            f"have another shape: {fault}); the file begins with {', '.join(list(state)[:3])}. Use weights of the "
            "network that `encoder` names"
        )
    used = {renamed[prefix + key] for key in given}
    return own | given, [key for key in state if key not in used]
