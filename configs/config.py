"""Experiment configs: flat JSON <-> `Config`, strict both ways. Standard library only; importing does nothing.

python configs/config.py exp_name=x criterion=tree_min lr=0.02          # write configs/x.json: what is not a default
python configs/config.py --cfg configs/quickstart.json exp_name=mine    # the same, starting from another file
python configs/config.py exp_name=x --full                              # with every key
python configs/config.py --help                                         # every key, its default and how to choose it
"""

import argparse
import dataclasses
import importlib
import json
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from configs.checks import checked, suggest
from utils.errors import UserError
from utils.files import parse_json, read_json, write_whole

CRITERIA = {  # a loss -> the decoding rule that suits what it trains: every node's logit, the leaves' or each level's
    **dict.fromkeys(("bce", "focal", "tree_min", "focal_tree_min", "c_hmcnn"), "logit_sum"),
    **dict.fromkeys(("ce", "path_ce", "level_ce", "hxe", "soft_margin"), "mass"),
    "node_ce": "level_sum",
}
DECODE_RULES = ("logit_sum", "prob_sum", "prob_mean", "leaf", "tree_min", "mass", "level_sum")
CACHES, AMP = ("auto", "memory", "device", "off"), ("auto", "off", "bf16", "fp16")
TTA = ("off", "flip", "full")  # flip doubles the work, full is 17 times as much
METRICS = ("mIoU", "mIoU_with_background", "pixel_accuracy", "violation_rate")

# Keys that may differ when a run is resumed: they change where and how, not what is computed.
RESUMABLE_CHANGES = frozenset(
    "exp_name root_dir root_data_dir device num_workers timeout_minutes cache save_epoch keep skip_unreadable "
    "eval_checkpoint decode root_bias tta metrics log_every".split()
)

# Keys that went; records of old runs may hold them. A config with one is refused, and pointed to CHANGELOG.md.
GONE = frozenset(
    "vflip criterion_warmup criterion_warmup_epochs step_epochs step_factor on_non_finite n_val_pictures "
    "save_last_every_minutes node_weights prior_bias poly_power sync_batchnorm".split()
)


def knob(default, help: str, **rule):
    """A config key: default, how to choose it, and the values it takes.

    Rules: `choices`; `low`, `high` and `above` of numbers; `kind` of a text (see configs/checks.py).
    """
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help, **rule})
    return dataclasses.field(default=default, metadata={"help": help, **rule})


def place(below: str, *parts: str) -> property:
    """A path below another place; in a part stands {key} for a key's value, which may be absolute or begin with "~"."""

    def path(config: "Config") -> Path:
        return getattr(config, below).joinpath(*(os.path.expanduser(part.format(**vars(config))) for part in parts))

    return property(path)


@dataclass
class Config:
    """One experiment. A flat JSON object with these keys; unknown keys and wrong types are refused."""

    # --- what and where ---
    exp_name: str = knob("hseg", "names the folders experiments/<exp_name> and tensorboard/<exp_name>", kind="name")
    root_dir: str = knob(".", "where experiments/ and tensorboard/ are made; relative to the repository")
    seed: int = knob(0, "of weights, order and augmentation; report at least three", low=0)
    deterministic: bool = knob(False, "equal runs on equal machines on a GPU too, at some speed")
    device: str = knob("auto", "auto takes a GPU where there is one; else cpu, cuda, cuda:1", kind="device")

    # --- data ---
    root_data_dir: str = knob("data/pascal_part", "the data set's folder; relative to root_dir")
    img_dir: str = knob("JPEGImages", "photos, relative to root_data_dir")
    gt_dir: str = knob("gt_masks_hie", "label maps written by tools/dataset_hie_enc.py, relative to root_data_dir")
    train_sample_ids_file: str = knob("train_id.txt", "one id a line; relative to root_data_dir")
    val_sample_ids_file: str = knob("val_id.txt", "one id a line; relative to root_data_dir")
    obey_exif: bool | None = knob(None, "masks are of photos as EXIF turns them: true, as stored: false, null: by size")
    n_train_photos: int | None = knob(None, "use only the first so many train ids, null: all", low=1)
    n_val_photos: int | None = knob(None, "use only the first so many val ids, null: all", low=1)
    hierarchy: str = knob("configs/hierarchies/pascal_part.json", "the label tree; relative to the repository")
    n_classes: int | None = knob(None, "nodes of the tree; derived from it, and checked if given", low=1)
    num_workers: int | str = knob("auto", "threads that read photos ahead, 0: none", low=0, high=256, choices=("auto",))
    cache: str = knob("auto", "where decoded photos are kept; auto: where they fit", choices=CACHES)
    skip_unreadable: int = knob(0, "damaged photos left out before it stops: of train, of val, in each process", low=0)

    # --- photo size and augmentation ---
    short_side: int | None = knob(None, "photos are resized to this short side, null: native size", low=32, high=8192)
    crop_size: int = knob(480, "side of the square training crops, a multiple of 32", low=32, high=4096)
    scale_jitter: list[float] | None = knob([0.75, 1.5], "scales before the crop, null: none", above=0, high=10)
    hflip: float = knob(0.5, "probability of a left-right flip", low=0, high=1)
    rotation: float = knob(0.0, "largest angle of a random turn, in degrees, 0: none", low=0, high=180)
    color_jitter: float = knob(0.0, "strength of brightness, contrast and saturation jitter, 0: none", low=0, high=1)

    # --- model ---
    encoder: str = knob("resnet18", "a network of torchvision, or timm:NAME; --encoders lists them")
    pretrained: bool = knob(True, "start from the encoder's own weights, of ImageNet (downloaded once)")
    encoder_weights: str | None = knob(None, "start from this state dict instead; relative to root_dir")
    init_from: str | None = knob(None, "or from what fits of this checkpoint, of any tree; relative to root_dir")
    decoder_channels: list[int] = knob([256, 128, 64, 32, 16], "after each of the 5 stages", low=1, high=4096)

    # --- objective ---
    criterion: str | dict[str, float] = knob(
        "bce", 'a loss, or a weighted sum such as {"tree_min": 1.0, "bce": 1.0}', choices=CRITERIA, low=0
    )
    gamma: float = knob(2.0, "focusing exponent of the focal losses, 0: the plain loss", low=0, high=10)

    # --- optimisation ---
    optimizer: str = knob("sgd", "sgd needs lr near 0.01, adam and adamw near 0.001", choices=("sgd", "adam", "adamw"))
    lr: float = knob(0.01, "peak learning rate", above=0)
    encoder_lr_factor: float = knob(1.0, "rate of the encoder over lr; 0.1 to 0.5 where it is pretrained", low=0)
    freeze_encoder_epochs: int = knob(0, "first epochs in which the encoder is left as it starts", low=0)
    momentum: float = knob(0.9, "of sgd; the first beta of adam and adamw", low=0, high=0.9999)
    weight_decay: float = knob(1e-4, "of all weights but biases and normalisation", low=0)
    schedule: str = knob("poly", "how lr falls from its peak", choices=("constant", "step", "poly", "cosine"))
    warmup_epochs: float = knob(0.0, "epochs of linear growth to lr, or a part; cut to half of a shorter run", low=0)
    batch_size: int = knob(15, "crops per process and step", low=1)
    accumulate: int = knob(1, "batches per optimiser step; the gradient equals that of one large batch", low=1)
    grad_clip: float = knob(0.0, "largest norm of the gradient, 0: no clipping", low=0)
    ema_decay: float = knob(0.0, "of averaged weights, 0: none; 0.99 for short runs", low=0, high=0.999999)
    n_epochs: int = knob(100, "passes over the training set", low=1)

    # --- speed ---
    amp: str = knob("auto", "mixed precision, which rounds differently; auto: bf16 on GPUs that have it", choices=AMP)
    channels_last: bool | str = knob("auto", "memory layout; auto: on GPUs with amp", choices=("auto",))
    compile: bool = knob(False, "torch.compile network and criterion; pays off in long runs")
    freeze_batchnorm: bool = knob(False, "keep the BatchNorm statistics of the start, for small batches")
    timeout_minutes: float = knob(10.0, "a process of several that hangs so long ends the run", above=0, high=10000)

    # --- validation, saving, evaluation ---
    val_every: int = knob(1, "epochs between validations; the last epoch always validates", low=1)
    metrics: list[str] = knob(["mIoU", "pixel_accuracy", "violation_rate"], "drawn as curves", choices=METRICS)
    monitor: str = knob("max mIoU1", 'what makes a checkpoint the best: "max SCORE" or "min SCORE"', kind="score")
    log_every: int = knob(10, "steps between two points of the curves loss and lr", low=1)
    save_epoch: int = knob(10, "epochs between kept checkpoints", low=1)
    keep: int = knob(5, "how many of those are kept; best and last always are", low=1)
    decode: str = knob("auto", "rule from scores to a leaf; auto: the criterion's", choices=("auto", *DECODE_RULES))
    root_bias: dict[str, float] = knob({}, "root name -> offset before the argmax; fit it with tools/fit_decode.py")
    tta: str = knob("off", "views averaged by evaluate, predict and export; full: six sizes, mirrored", choices=TTA)
    eval_checkpoint: str | None = knob(None, "what evaluate.py scores: best, last, checkpoint_<epoch> or a path")

    def __post_init__(self) -> None:
        for key, field in FIELDS.items():
            setattr(self, key, checked(key, getattr(self, key), TYPES[key], field.metadata))
        crop, jitter, channels = self.crop_size, self.scale_jitter, self.decoder_channels
        if crop % 32:
            raise UserError(f"key 'crop_size': {crop} is not a multiple of 32; use {crop // 32 * 32 + 32}")
        if jitter is not None and (len(jitter) != 2 or jitter[0] > jitter[1]):
            raise UserError(f"key 'scale_jitter': expected [smallest, largest], found {jitter}")
        if self.batch_size == 1 and crop == 32 and not self.freeze_batchnorm:
            raise UserError("keys 'batch_size' 1 and 'crop_size' 32 leave BatchNorm one value; raise one of them")
        if len(channels) != 5:
            raise UserError(f"key 'decoder_channels': expected 5 numbers, one a stage, found {len(channels)}")
        if isinstance(self.criterion, dict) and not sum(self.criterion.values()) > 0:
            raise UserError("key 'criterion': expected at least one loss with a weight above 0")
        if self.encoder_weights is not None and (self.pretrained or self.init_from is not None):
            other, value = ("pretrained", "false") if self.pretrained else ("init_from", "null")
            raise UserError(f"keys {other!r} and 'encoder_weights' exclude each other: set {other}={value}")

    @property
    def decode_rule(self) -> str:
        """`decode`, or the criterion's own rule."""
        return default_decode(self.criterion) if self.decode == "auto" else self.decode

    # --- places ---
    repository = REPOSITORY
    root = place("repository", "{root_dir}")
    hierarchy_file = place("repository", "{hierarchy}")
    data_dir = place("root", "{root_data_dir}")
    images_dir = place("data_dir", "{img_dir}")
    labels_dir = place("data_dir", "{gt_dir}")
    experiment_dir = place("root", "experiments", "{exp_name}")
    checkpoints_dir = place("experiment_dir", "models_checkpoints")
    tensorboard_dir = place("root", "tensorboard", "{exp_name}")
    copy_file = place("experiment_dir", "configs", "{exp_name}.json")  # complete; where it stands, a run can go on

    def ids_file(self, split: str) -> Path:
        """The id list of the split "train" or "val"."""
        return self.data_dir / os.path.expanduser(getattr(self, f"{split}_sample_ids_file"))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def default_decode(criterion: str | dict[str, float]) -> str:
    """The rule of a loss; of a sum, that of the loss with the largest weight, the first of equals."""
    return CRITERIA[criterion if isinstance(criterion, str) else max(criterion, key=criterion.__getitem__)]


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """The config in a JSON file (None: the defaults), with `key=value` overrides on top.

    Raises: UserError naming the file and key for anything that is not exactly a config.
    """
    values, source, is_record = {}, "the defaults", False
    if path is not None:
        values, source, folder = read_json(path), str(path), Path(path).resolve().parent
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object of config keys, found {type(values).__name__}")
        is_record = (folder.name, folder.parent.name) == ("configs", Path(path).stem)  # the copy of a run
    values = values | parse_overrides(overrides)
    return config_from_dict(values, f"{source} with overrides" if overrides else source, is_record)


def config_from_dict(values: dict, source: str, is_record: bool = False) -> Config:
    """A config from plain JSON values; `source` is named in errors. What a run recorded may hold keys that went."""
    for key in values:
        if key in GONE and not is_record:
            raise UserError(f"{source}: leave out {key!r}, which is no longer a key; CHANGELOG.md says more")
        if key not in FIELDS and key not in GONE:
            meant = suggest(key, FIELDS) or "."
            raise UserError(f"{source}: unknown key {key!r}{meant} `python configs/config.py --help` lists all keys")
    try:
        return Config(**{key: value for key, value in values.items() if key in FIELDS})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def save_config(config: Config, path: str | Path, full: bool = True) -> None:
    """Writes the config as JSON, one key a line: all of them, or exp_name and those that differ from the defaults.

    Raises: OSError.
    """
    path, values = Path(path), config.to_dict()
    if not full:
        changed = differences(config, Config())
        values = {key: value for key, value in values.items() if key == "exp_name" or key in changed}
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole("{\n" + ",\n".join(lines) + "\n}\n", path)


def parse_overrides(overrides: typing.Sequence[str]) -> dict:
    """`["lr=0.02", "criterion=tree_min"]` -> values; each value is JSON where it parses as JSON, else a string."""
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not an override; expected key=value, such as batch_size=4")
        try:
            values[key] = parse_json(text)
        except (ValueError, RecursionError):
            values[key] = text
        if TYPES.get(key) is str:
            values[key] = text  # exp_name=2024 is a name, not a number
    return values


def differences(ours: Config, theirs: Config) -> dict[str, tuple]:
    """Key -> (ours, theirs) for the keys that differ."""
    a, b = ours.to_dict(), theirs.to_dict()
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def _keys() -> str:
    lines = ["keys:"]
    for key, default in Config().to_dict().items():
        rule = FIELDS[key].metadata
        lines += [f"  {key} = {json.dumps(default)}", f"      {rule['help']}"]
        if "choices" in rule:
            lines.append(f"      one of: {', '.join(rule['choices'])}")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=_keys(), formatter_class=raw)
    parser.add_argument("--cfg", metavar="BASE", help="start from this file instead of the defaults")
    parser.add_argument("--full", action="store_true", help="write every key, not only those that differ")
    parser.add_argument("--encoders", action="store_true", help="list the encoders of torchvision, and write nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs")
    arguments = parser.parse_intermixed_args()
    if arguments.encoders:
        encoders = importlib.import_module("models.encoders.torchvision")  # here alone does a config ask a model
        print(*encoders.listing(), "timm:NAME            any network of timm, where it is installed", sep="\n")
        return
    config = load_config(arguments.cfg, arguments.overrides)
    path = REPOSITORY / "configs" / f"{config.exp_name}.json"
    if path.exists() and load_config(path) != config:
        raise UserError(f"{path} exists with other values; choose another exp_name, or delete the file first")
    save_config(config, path, arguments.full)
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
