"""Experiment configs: flat JSON <-> `Config`, strict both ways. Standard library only; importing does nothing.

python configs/config.py                                        # write the defaults to configs/<exp_name>.json
python configs/config.py exp_name=x criterion=tree_min lr=0.02  # write configs/x.json
python configs/config.py --help                                 # every key, its default and how to choose it
"""

import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from utils.errors import UserError
from utils.files import parse_json, read_json, write_whole

ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CRITERIA = ("ce", "path_ce", "bce", "focal", "tree_min", "focal_tree_min")
DECODE_RULES = ("logit_sum", "prob_sum", "prob_mean", "leaf", "tree_min", "mass")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "poly", "cosine")
NODE_WEIGHTS = ("none", "inverse_sqrt", "effective_number")
LARGEST = 2**53  # of any number; above it floats skip whole numbers
METRICS = ("mIoU", "mIoU_with_background", "pixel_accuracy", "violation_rate")

# Keys that may differ when a run is resumed: they change where and how, not what is computed.
RESUMABLE_CHANGES = frozenset(
    "root_dir root_data_dir device num_workers save_epoch keep save_last_every_minutes skip_unreadable "
    "eval_checkpoint decode root_bias metrics n_val_pictures log_every".split()
)


def knob(default, help: str, *, choices=None, low=None, high=None, above=None, kind=None):
    """A config key: default, how to choose it, and the values it takes (`kind`: name, inside or path)."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "kind": kind}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """One experiment. A flat JSON object with these keys; unknown keys and wrong types are refused."""

    # --- what and where ---
    exp_name: str = knob("hseg", "names the folders experiments/<exp_name> and tensorboard/<exp_name>", kind="name")
    root_dir: str = knob(".", "where experiments/ and tensorboard/ are made; relative to the repository", kind="path")
    seed: int = knob(0, "of weights, order and augmentation; report at least three", low=0, high=2**31 - 1)
    deterministic: bool = knob(False, "equal runs on equal machines on a GPU too, at some speed")
    device: str = knob("auto", "auto takes a GPU where there is one; else cpu, cuda, cuda:1, mps", kind="device")

    # --- data ---
    root_data_dir: str = knob("data/pascal_part", "the data set's folder; relative to root_dir", kind="path")
    img_dir: str = knob("JPEGImages", "photos, inside root_data_dir", kind="inside")
    gt_dir: str = knob("gt_masks_hie", "label maps written by tools/dataset_hie_enc.py", kind="inside")
    train_sample_ids_file: str = knob("train_id.txt", "one id a line, inside root_data_dir", kind="inside")
    val_sample_ids_file: str = knob("val_id.txt", "one id a line, inside root_data_dir", kind="inside")
    n_train_photos: int | None = knob(None, "use only the first so many train ids, null: all", low=1)
    n_val_photos: int | None = knob(None, "use only the first so many val ids, null: all", low=1)
    hierarchy: str = knob(
        "configs/hierarchies/pascal_part.json", "the label tree; relative to the repository", kind="path"
    )
    n_classes: int | None = knob(None, "nodes of the tree; derived from it, and checked if given", low=1)
    num_workers: int | str = knob(
        "auto",
        "loader processes; auto looks at the cores; 0 loads in the main process",
        low=0,
        high=256,
        choices=("auto",),
    )
    skip_unreadable: int = knob(0, "damaged photos left out before it stops: of train, of val, in each process", low=0)

    # --- photo size and augmentation ---
    short_side: int | None = knob(
        None, "photos are resized to this short side first, null: native size", low=32, high=8192
    )
    crop_size: int = knob(480, "side of the square training crops, a multiple of 32", low=32, high=4096)
    scale_jitter: list[float] | None = knob(
        [0.75, 1.5], "range of random scales before the crop, null: none", above=0, high=10
    )
    hflip: float = knob(0.5, "probability of a left-right flip", low=0, high=1)
    vflip: float = knob(0.0, "probability of an upside-down flip; people do not stand on their heads", low=0, high=1)
    color_jitter: float = knob(0.0, "strength of brightness, contrast and saturation jitter, 0: none", low=0, high=1)

    # --- model ---
    encoder: str = knob("resnet18", "torchvision ResNet", choices=ENCODERS)
    pretrained: bool = knob(True, "start from torchvision's ImageNet weights (downloaded once)")
    encoder_weights: str | None = knob(None, "start from this state dict instead; relative to root_dir", kind="path")
    decoder_channels: list[int] = knob(
        [256, 128, 64, 32, 16], "channels after each of the 5 up-sampling stages", low=1, high=4096
    )
    prior_bias: bool = knob(True, "start the head at the data's class shares instead of at 0.5 each")

    # --- objective ---
    criterion: str | dict[str, float] = knob(
        "bce", 'a loss, or a weighted sum such as {"tree_min": 1.0, "bce": 1.0}', choices=CRITERIA, low=0
    )
    criterion_warmup: str | dict[str, float] | None = knob(
        None, "another loss for the first criterion_warmup_epochs, null: none", choices=CRITERIA, low=0
    )
    criterion_warmup_epochs: int = knob(0, "how many epochs are trained with criterion_warmup", low=0)
    gamma: float = knob(2.0, "focusing exponent of the focal losses, 0: the plain loss", low=0, high=10)
    node_weights: str = knob(
        "none", "weight of each node's term, from the pixel counts of the encoding", choices=NODE_WEIGHTS
    )

    # --- optimisation ---
    optimizer: str = knob("sgd", "sgd needs lr near 0.01, adam and adamw near 0.001", choices=OPTIMIZERS)
    lr: float = knob(0.01, "peak learning rate", above=0, high=100)
    momentum: float = knob(0.9, "of sgd; the first beta of adam and adamw", low=0, high=0.9999)
    weight_decay: float = knob(1e-4, "of all weights but biases and normalisation", low=0, high=10)
    schedule: str = knob("poly", "how lr falls from its peak, as a function of the step", choices=SCHEDULES)
    warmup_epochs: float = knob(0.0, "epochs of linear growth to lr, may be a fraction", low=0)
    poly_power: float = knob(0.9, "of the poly schedule", above=0, high=10)
    step_epochs: list[int] = knob([], "epochs at which the step schedule multiplies lr by step_factor", low=1)
    step_factor: float = knob(0.1, "of the step schedule", above=0, high=1)
    batch_size: int = knob(15, "crops per process and step", low=1, high=65536)
    accumulate: int = knob(
        1, "batches per optimiser step; the gradient equals that of one large batch", low=1, high=65536
    )
    grad_clip: float = knob(0.0, "largest norm of the gradient, 0: no clipping", low=0)
    ema_decay: float = knob(
        0.0,
        "average of the weights that is validated and kept, 0: none; 0.99 for short runs",
        low=0,
        high=0.999999,
    )
    n_epochs: int = knob(100, "passes over the training set", low=1, high=1000000)
    on_non_finite: str = knob(
        "stop",
        "on a loss or gradient that is not finite; skip leaves the step out, 20 at most",
        choices=("stop", "skip"),
    )

    # --- speed ---
    amp: str = knob("off", "mixed precision of the network; the loss stays in float32", choices=("off", "bf16", "fp16"))
    channels_last: bool = knob(False, "memory layout; faster on GPUs with mixed precision")
    compile: bool = knob(False, "torch.compile the network; pays off in long runs")
    freeze_batchnorm: bool = knob(False, "keep the BatchNorm statistics of the start, for small batches")
    sync_batchnorm: bool = knob(False, "BatchNorm statistics over all processes (GPUs only)")

    # --- validation, saving, evaluation ---
    val_every: int = knob(1, "epochs between validations; the last epoch always validates", low=1)
    metrics: list[str] = knob(
        ["mIoU", "pixel_accuracy", "violation_rate"],
        "scores drawn as curves, at every level they have",
        choices=METRICS,
    )
    monitor: str = knob("max mIoU1", 'what makes a checkpoint the best: "max SCORE" or "min SCORE"')
    n_val_pictures: int = knob(4, "val photos drawn in TensorBoard at each validation", low=0, high=64)
    log_every: int = knob(10, "steps between two points of the curves loss and lr", low=1)
    save_epoch: int = knob(10, "epochs between kept checkpoints", low=1)
    keep: int = knob(5, "how many of those are kept; best and last always are", low=1)
    save_last_every_minutes: float = knob(10.0, "time between saves of last.pt inside an epoch, 0: none", low=0)
    decode: str = knob("logit_sum", "rule from node scores to a leaf", choices=DECODE_RULES)
    root_bias: dict[str, float] = knob({}, "root name -> offset before the argmax; fit it with tools/fit_decode.py")
    eval_checkpoint: str | None = knob(
        None, "what evaluate.py scores: best, last, checkpoint_<epoch> or a path", kind="path"
    )

    def __post_init__(self) -> None:
        _check(self)

    # --- folders ---
    @property
    def root(self) -> Path:
        return REPOSITORY / os.path.expanduser(self.root_dir)

    @property
    def data_dir(self) -> Path:
        return self.root / os.path.expanduser(self.root_data_dir)

    @property
    def images_dir(self) -> Path:
        return self.data_dir / self.img_dir

    @property
    def labels_dir(self) -> Path:
        return self.data_dir / self.gt_dir

    @property
    def experiment_dir(self) -> Path:
        return self.root / "experiments" / self.exp_name

    @property
    def checkpoints_dir(self) -> Path:
        return self.experiment_dir / "models_checkpoints"

    @property
    def tensorboard_dir(self) -> Path:
        return self.root / "tensorboard" / self.exp_name

    @property
    def hierarchy_file(self) -> Path:
        return REPOSITORY / os.path.expanduser(self.hierarchy)

    def ids_file(self, split: str) -> Path:
        """The id list of the split "train" or "val"."""
        return self.data_dir / (self.train_sample_ids_file if split == "train" else self.val_sample_ids_file)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """The config in a JSON file (None: the defaults), with `key=value` overrides on top.

    Raises: UserError naming the file and key for anything that is not exactly a config.
    """
    values = {} if path is None else read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object of config keys, found {_name_of(values)}")
    source = str(path) if path is not None else "the defaults"
    return config_from_dict(
        values | parse_overrides(overrides), source if not overrides else f"{source} with overrides"
    )


def config_from_dict(values: dict, source: str) -> Config:
    """A config from plain JSON values; `source` is named in errors."""
    for key in values:
        if key not in FIELDS:
            raise UserError(
                f"{source}: unknown key {key!r}{_suggest(key) or '.'} `python configs/config.py --help` lists all keys"
            )
    try:
        return Config(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def save_config(config: Config, path: str | Path) -> None:
    """Writes the config as JSON, one key a line."""
    path = Path(path)
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in config.to_dict().items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole("{\n" + ",\n".join(lines) + "\n}\n", path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the config ({error.strerror}); choose a folder you may write to"
        ) from None


def parse_overrides(overrides: typing.Sequence[str]) -> dict:
    """`["lr=0.02", "criterion=tree_min"]` -> values; each value is JSON where it parses as JSON, else a string."""
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not an override; expected key=value, such as batch_size=4")
        if key in values:
            raise UserError(f"the override {key!r} is given twice")
        try:
            values[key] = parse_json(text)
        except (ValueError, RecursionError):
            values[key] = text
        if key in FIELDS and isinstance(FIELDS[key].default, str) and TYPES[key] is str:
            values[key] = text  # exp_name=2024 is a name, not a number
    return values


def differences(ours: Config, theirs: Config) -> dict[str, tuple]:
    """Key -> (ours, theirs) for the keys that differ."""
    a, b = ours.to_dict(), theirs.to_dict()
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


# --- checks ---
def _check(config: Config) -> None:
    for key, field in FIELDS.items():
        value = _coerce(key, getattr(config, key), TYPES[key])
        setattr(config, key, value)
        _check_value(key, value, field.metadata)
    if config.crop_size % 32:
        raise UserError(
            f"key 'crop_size': {config.crop_size} is not a multiple of 32; use {config.crop_size // 32 * 32 + 32}"
        )
    if config.scale_jitter is not None and (
        len(config.scale_jitter) != 2 or config.scale_jitter[0] > config.scale_jitter[1]
    ):
        raise UserError(f"key 'scale_jitter': expected [smallest, largest], found {config.scale_jitter}")
    if len(config.decoder_channels) != 5:
        raise UserError(
            f"key 'decoder_channels': expected 5 numbers, one a stage, found {len(config.decoder_channels)}"
        )
    for key in ("criterion", "criterion_warmup"):
        spec = getattr(config, key)
        if isinstance(spec, dict) and not sum(spec.values()) > 0:
            raise UserError(f"key {key!r}: expected at least one loss with a weight above 0")
    if (config.criterion_warmup is None) != (config.criterion_warmup_epochs == 0):
        raise UserError("keys 'criterion_warmup' and 'criterion_warmup_epochs' go together; set both, or neither")
    if config.criterion_warmup_epochs >= config.n_epochs:
        raise UserError(
            f"key 'criterion_warmup_epochs': {config.criterion_warmup_epochs} leaves no epoch of n_epochs "
            f"{config.n_epochs} to 'criterion'; lower it"
        )
    if not re.fullmatch(r"(max|min) \S+", config.monitor):
        raise UserError(f'key \'monitor\': expected "max SCORE" or "min SCORE", found {config.monitor!r}')
    if config.pretrained and config.encoder_weights is not None:
        raise UserError(
            "keys 'pretrained' and 'encoder_weights' exclude each other; set pretrained to false to use the file"
        )
    if config.schedule == "step" and not config.step_epochs:
        raise UserError("key 'step_epochs': the step schedule needs at least one epoch, such as [60, 80]")
    if config.warmup_epochs >= config.n_epochs:
        raise UserError(
            f"key 'warmup_epochs': {config.warmup_epochs:g} leaves nothing of n_epochs {config.n_epochs}; lower it"
        )


def _coerce(key: str, value, hint):
    """The value in the key's type; an int where a float is meant is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is float and type(value) is int and abs(value) <= LARGEST:
            return float(value)
        if origin is list and type(value) is list:
            return [_coerce(f"{key}[{i}]", item, inner[0]) for i, item in enumerate(value)]
        if origin is dict and type(value) is dict:
            return {name: _coerce(f"{key}.{name}", item, inner[1]) for name, item in value.items()}
        if type(value) is origin:
            return value
    expected = " or ".join(_name_of_type(option) for option in options)
    raise UserError(f"key {key!r}: expected {expected}, found {_name_of(value)} {_short(value)}")


def _check_value(key: str, value, rule) -> None:
    if isinstance(value, list):
        for item in value:
            _check_value(key, item, rule)
    elif isinstance(value, dict):
        for name, item in value.items():
            if rule["choices"] is not None:
                _check_choice(key, name, rule["choices"])
            _check_number(f"{key}.{name}", item, rule)
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int | float):
        _check_number(key, value, rule)
    else:
        if rule["choices"] is not None:
            _check_choice(key, value, rule["choices"])
        _check_text(key, value, rule["kind"])


def _check_choice(key: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(f"key {key!r}: {_short(value)} is not one of {', '.join(choices)}{_suggest(value, choices)}")


def _check_number(key: str, value, rule) -> None:
    low, high, above = rule["low"], rule["high"], rule["above"]
    found = f"found {_short(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"key {key!r}: expected a finite number, {found}")
    if low is not None and value < low:
        raise UserError(f"key {key!r}: expected at least {low}, {found}")
    if above is not None and value <= above:
        raise UserError(f"key {key!r}: expected more than {above}, {found}")
    if value > (LARGEST if high is None else high):
        raise UserError(f"key {key!r}: expected at most {LARGEST if high is None else high}, {found}")


def _check_text(key: str, value: str, kind: str | None) -> None:
    if not value or "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
        raise UserError(f"key {key!r}: expected a text of printable characters, found {_short(value)}")
    if kind == "name" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise UserError(
            f"key {key!r}: expected letters, digits, '.', '_' and '-' (at most 100, no folders), found {_short(value)}"
        )
    if kind == "inside" and (PurePosixPath(value).is_absolute() or ".." in re.split(r"[/\\]", value)):
        raise UserError(f"key {key!r}: expected a place inside root_data_dir, found {_short(value)}")
    if kind in ("path", "inside") and (
        len(os.fsencode(value)) > 1000 or any(len(os.fsencode(name)) > 255 for name in value.split("/"))
    ):
        raise UserError(f"key {key!r}: a path of {len(value)} characters is too long, or a name in it is")
    if kind == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise UserError(f"key {key!r}: expected auto, cpu, mps, cuda or cuda:<number>, found {_short(value)}")


# --- messages ---
def _suggest(word: str, choices=None) -> str:
    close = difflib.get_close_matches(str(word), choices if choices is not None else list(FIELDS), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _name_of_type(kind) -> str:
    kind = typing.get_origin(kind) or kind
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
    return names.get(kind, "an object" if kind is dict else "null")


def _name_of(value) -> str:
    return _name_of_type(type(value))


def _short(value) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _help() -> str:
    lines = [__doc__, "keys:"]
    for key, field in FIELDS.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        choices = field.metadata["choices"]
        lines.append(f"  {key} = {json.dumps(default)}\n      {field.metadata['help']}")
        if choices:
            lines.append(f"      one of: {', '.join(choices)}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help())
        return
    config = load_config(None, arguments)
    path = REPOSITORY / "configs" / f"{config.exp_name}.json"
    if path.exists() and load_config(path) != config:
        raise UserError(f"{path} exists with other values; choose another exp_name, or delete the file first")
    save_config(config, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
