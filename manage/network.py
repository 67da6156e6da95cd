"""Config and tree -> network, and back from a checkpoint."""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.config import Config, config_from_dict, without_gone
from manage.checkpoint import DamagedCheckpoint
from models.hseg import HSEG
from utils.errors import UserError
from utils.hierarchy import Hierarchy


def load_hierarchy(config: Config) -> Hierarchy:
    """The tree a config names, checked against what else the config says of it."""
    hierarchy = Hierarchy.load(config.hierarchy_file)
    check_fits(config, hierarchy)
    return hierarchy


def check_fits(config: Config, hierarchy: Hierarchy) -> None:
    """Raises: UserError when n_classes, monitor or root_bias do not fit the tree."""
    if config.n_classes is not None and config.n_classes != hierarchy.num_nodes:
        raise UserError(
            f"key 'n_classes': {config.n_classes}, but the tree {hierarchy.name!r} ({config.hierarchy}) has "
            f"{hierarchy.num_nodes} nodes; correct it, or leave it out: it is derived from the tree"
        )
    monitored, possible = config.monitor.split()[1], score_names(hierarchy)
    if monitored not in possible:
        raise UserError(f"key 'monitor': {monitored!r} is not a score; expected one of {', '.join(possible)}")
    roots = [hierarchy.names[root] for root in hierarchy.roots]
    for name in config.root_bias:
        if name not in roots:
            raise UserError(f"key 'root_bias': {name!r} is not a root of the tree; its roots are {', '.join(roots)}")


def score_names(hierarchy: Hierarchy) -> list[str]:
    """The scores that can be monitored."""
    levels = range(1, hierarchy.num_levels + 1)
    names = [f"mIoU{level}{end}" for level in levels for end in ("", "_with_background")]
    return [*names, "pixel_accuracy", "violation_rate", "loss_val"]


def root_bias(config: Config, hierarchy: Hierarchy) -> list[float] | None:
    """One offset for each root, in the tree's order; None without any."""
    if not config.root_bias:
        return None
    return [config.root_bias.get(hierarchy.names[root], 0.0) for root in hierarchy.roots]


def build_network(config: Config, hierarchy: Hierarchy, pixel_counts: Sequence[int] | None = None) -> HSEG:
    """A network at the start of training; with `pixel_counts` (per node) its head starts at the classes' shares.

    Raises: UserError when its weights cannot be had.
    """
    weights = None if config.encoder_weights is None else config.root / config.encoder_weights
    try:
        network = HSEG(config.encoder, hierarchy.num_nodes, config.pretrained, weights, config.decoder_channels)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if config.prior_bias and pixel_counts is not None:
        network.segmentation_head.start_at(prior_logits(pixel_counts, hierarchy))
    return network


def prior_logits(pixel_counts: Sequence[int], hierarchy: Hierarchy) -> Tensor:
    """The logit of each node's share of the pixels."""
    counts = torch.tensor(pixel_counts, dtype=torch.float64)
    total = counts[list(hierarchy.roots)].sum().clamp(min=1)
    return (counts / total).clamp(1e-4, 1 - 1e-4).logit().float()


def restore_network(state: dict, source: str) -> tuple[Config, Hierarchy, HSEG]:
    """What a checkpoint was trained with, and its network with the weights to use (the averaged ones, if any).

    Raises: UserError naming what does not fit.
    """
    try:
        saved, tree, weights = state["config"], state["tree"], state["ema"] or state["model"]
    except KeyError as error:
        raise DamagedCheckpoint(f"{source}: lacks {error}; expected a checkpoint written by train.py") from None
    config = config_from_dict(
        without_gone(saved, any_value=True) | {"pretrained": False, "encoder_weights": None}, f"{source}, its config"
    )
    hierarchy = Hierarchy.from_dict(tree, f"{source}, its tree")
    network = HSEG(config.encoder, hierarchy.num_nodes, decoder_channels=config.decoder_channels)
    load_weights(network, weights, source)
    return config, hierarchy, network.eval()


def load_weights(network: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads every weight exactly.

    Raises: UserError when the checkpoint is of another architecture.
    """
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DamagedCheckpoint(f"{source}: holds no weights (name -> tensor); expected a checkpoint of train.py")
    own = network.state_dict()
    wrong = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    foreign = [key for key in weights if key not in own]
    if wrong or foreign:
        raise UserError(
            f"{source}: is of another architecture ({len(wrong)} weights missing or of another shape, {len(foreign)} "
            f"unknown; the first: {(wrong + foreign)[0]}); use the config that it was trained with"
        )
    network.load_state_dict(weights)


def check_same_network(config: Config, hierarchy: Hierarchy, state: dict, source: str) -> None:
    """Raises: UserError when a checkpoint was made with another tree, encoder or decoder than the config's."""
    theirs = Hierarchy.from_dict(state["tree"], f"{source}, its tree")
    if theirs.fingerprint != hierarchy.fingerprint:
        raise UserError(
            f"{source}: was trained with the tree {theirs.name!r} ({theirs.num_nodes} nodes), the config's "
            f"{config.hierarchy} is {hierarchy.name!r} ({hierarchy.num_nodes} nodes); evaluate it with its own tree"
        )
    for key in ("encoder", "decoder_channels"):
        if state["config"].get(key) != getattr(config, key):
            raise UserError(
                f"{source}: is of another architecture ({key} {state['config'].get(key)!r}, the config has "
                f"{getattr(config, key)!r}); use the config that it was trained with"
            )


def check_same_tree(config: Config, hierarchy: Hierarchy, state: dict, source: str) -> None:
    """After `check_same_network`: raises UserError where the trees differ in what the fingerprint leaves out.

    Colours may differ; the scores do not depend on them.
    """
    changed = tree_changes(Hierarchy.from_dict(state["tree"], f"{source}, its tree"), hierarchy)
    if changed:
        raise UserError(
            f"{config.hierarchy_file}: the tree has changed since {source} was written ({'; '.join(changed)}). A run "
            "that goes on must keep it: put the old tree back, or choose another exp_name"
        )


def tree_changes(theirs: Hierarchy, ours: Hierarchy) -> list[str]:
    """In what two trees of one fingerprint differ, beside colours."""
    then, now = _beside_fingerprint(theirs), _beside_fingerprint(ours)
    return [f"{key!r} was {then[key]!r}, is {now[key]!r}" for key in then if then[key] != now[key]]


def _beside_fingerprint(hierarchy: Hierarchy) -> dict:
    """What a tree says beyond ids, names, parents and colours of its nodes."""
    return {
        "name": hierarchy.name,
        "ignore_index": hierarchy.ignore_index,
        "levels": list(hierarchy.level_names),
        "background": [hierarchy.names[v] for v in sorted(hierarchy.background)],
    }
