"""Config and tree -> network, and back from a checkpoint."""

import os
from pathlib import Path

import torch
from torch import Tensor

from configs.config import Config, config_from_dict
from manage.checkpoint import load_checkpoint
from models.hseg import HSEG
from utils.errors import UserError
from utils.hierarchy import Hierarchy


def load_hierarchy(config: Config) -> Hierarchy:
    """The tree a config names. Raises: UserError when n_classes or monitor do not fit it."""
    hierarchy = Hierarchy.load(config.hierarchy_file)
    if config.n_classes is not None and config.n_classes != hierarchy.num_nodes:
        known = f"the tree {config.hierarchy} has {hierarchy.num_nodes} nodes"
        raise UserError(f"key 'n_classes': {config.n_classes}, but {known}; correct it, or leave it out")
    monitored, levels = config.monitor.split()[1], range(1, hierarchy.num_levels + 1)
    possible = [f"mIoU{level}{end}" for level in levels for end in ("", "_with_background")]
    possible += ["pixel_accuracy", "violation_rate", "loss_val"]
    if monitored not in possible:
        raise UserError(f"key 'monitor': {monitored!r} is not a score; expected one of {', '.join(possible)}")
    return hierarchy


def build_network(config: Config, hierarchy: Hierarchy, subpixel: bool = False) -> HSEG:
    """A network with random weights. Raises: UserError for an encoder that is not there."""
    try:
        return HSEG(config.encoder, hierarchy.num_nodes, decoder_channels=config.decoder_channels, subpixel=subpixel)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"key 'encoder': {error}") from None


def load_start_weights(network: HSEG, hierarchy: Hierarchy, config: Config, say=print) -> None:
    """What a new run starts from: ImageNet weights, a state dict of the encoder, or another run's checkpoint.

    A run that goes on, an evaluation and a prediction have their checkpoint and need none of these.
    Raises: UserError when the weights cannot be had or do not fit.
    """
    if config.init_from is not None:
        _init_from(network, hierarchy, config.root / os.path.expanduser(config.init_from), say)
        return
    try:
        if config.encoder_weights is not None:
            path = config.root / os.path.expanduser(config.encoder_weights)
            if left_over := network.encoder.load_file(path):
                shown = f"{len(left_over)} tensors left over ({', '.join(left_over[:4])}, ...)"
                say(f"{path}: all weights of {config.encoder} found; {shown}")
        elif config.pretrained:
            network.encoder.load_pretrained()
    except RuntimeError as error:
        raise UserError(str(error)) from None


def _init_from(network: HSEG, hierarchy: Hierarchy, path: Path, say) -> None:
    """Takes what fits from a checkpoint of any tree: weights by name and shape, rows of the head by node name."""
    state = load_checkpoint(path)
    theirs = Hierarchy.from_dict(state["tree"], f"{path}, its tree")
    given, own = state.get("ema") or state["model"], network.state_dict()
    body = [key for key in own if not key.startswith("segmentation_head.")]
    fitting = {key: given[key] for key in body if key in given and given[key].shape == own[key].shape}
    if not any(key.startswith("encoder.") for key in fitting):
        raise UserError(f"key 'init_from': nothing of {path} fits; set encoder to {state['config'].get('encoder')!r}")
    shared = [name for name in hierarchy.names if name in theirs.names]
    for key in ("segmentation_head.weight", "segmentation_head.bias"):
        if key in given and given[key].shape[1:] == own[key].shape[1:]:
            for name in shared:
                own[key][hierarchy.names.index(name)] = given[key][theirs.names.index(name)].to(own[key])
    network.load_state_dict(own | fitting)
    anew = [f"node {name!r}" for name in hierarchy.names if name not in shared]
    anew += [key for key in body if key not in fitting]
    say(f"started from {path}; at random: {', '.join(anew) or 'nothing'}")


def restore_network(state: dict, source: str) -> tuple[Config, Hierarchy, HSEG]:
    """What a checkpoint was trained with, and its network with the weights to use (the averaged ones, if any).

    Raises: UserError naming what does not fit.
    """
    config = config_from_dict(state["config"], f"{source}, its config", is_record=True)
    hierarchy = Hierarchy.from_dict(state["tree"], f"{source}, its tree")
    weights = state.get("ema") or state["model"]
    last = weights.get("decoder.last.block.0.weight")  # of version 0.1: a 1 x 1 convolution
    network = build_network(config, hierarchy, subpixel=isinstance(last, Tensor) and last.shape[-1] == 1)
    load_weights(network, weights, source)
    return config, hierarchy, network.eval()


def load_weights(network: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads every weight exactly. Raises: UserError when the checkpoint is of another architecture."""
    own = network.state_dict()
    weights = {key: own[key] for key in ("input_mean", "input_std") if key in own} | weights  # version 0.1 lacks them
    wrong = [key for key in own if getattr(weights.get(key), "shape", None) != own[key].shape]
    foreign = [key for key in weights if key not in own]
    if wrong or foreign:
        raise UserError(
            f"{source}: is of another architecture ({len(wrong)} weights missing or of another shape, {len(foreign)} "
            f"unknown; the first: {(wrong + foreign)[0]}); use the config that it was trained with"
        )
    network.load_state_dict(weights)


def tree_changes(theirs: Hierarchy, ours: Hierarchy) -> list[str]:
    """In what two trees differ, beside colours: no score depends on these."""
    parts = {"nodes": "fingerprint", "levels": "level_names", "name": "name", "ignore_index": "ignore_index"}
    parts |= {"background": "background", "mirrors": "mirrors"}
    return [part for part, key in parts.items() if getattr(theirs, key) != getattr(ours, key)]
