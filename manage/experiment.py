"""The folders of one experiment: lock, config, environment record."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import PIL
import torch
import torchvision

from configs.config import (
    REPOSITORY,
    RESUMABLE_CHANGES,
    Config,
    config_from_dict,
    differences,
    load_config,
    save_config,
)
from manage.network import tree_changes
from utils.cli import cores
from utils.errors import UserError
from utils.files import read_json, remove_unfinished, set_aside, write_json
from utils.hierarchy import Hierarchy
from utils.locks import Lock


def create_experiment(config: Config, lock: Lock, overwrite: bool = False, take_over: bool = False) -> None:
    """Makes the folders of a new experiment and takes its lock; `write_copies` follows.

    Raises: OSError; UserError when the experiment exists, unless `overwrite` moves it aside.
    """
    config.experiment_dir.mkdir(parents=True, exist_ok=True)
    lock.take(take_over)
    if _has_results(config):
        if not overwrite:
            raise UserError(_already_there(config))
        lock.release()
        for aside in set_aside(config.experiment_dir, config.tensorboard_dir):
            print(f"moved {aside.name.partition('.old-')[0]} to {aside}")
        config.experiment_dir.mkdir(parents=True)
        lock.take()
    make_folders(config)


def open_experiment(config: Config, lock: Lock, take_over: bool = False) -> None:
    """Takes the lock of an experiment that is to be resumed. Raises: OSError; UserError when there is none."""
    if not config.copy_file.exists():
        raise UserError(f"{config.experiment_dir}: nothing to resume there; start without --resume")
    lock.take(take_over)
    make_folders(config)
    remove_unfinished(config.checkpoints_dir)


def check_same_run(config: Config, hierarchy: Hierarchy, state: dict, source: str, lists: dict, is_new: bool) -> Config:
    """The config of a checkpoint that a run can go on from; under a new name, if it is `is_new`.

    Raises: UserError where the tree, a key that changes results, or the `lists` of photos differ; n_epochs may grow.
    """
    if state["format"] < 2:
        raise UserError(
            f"{source}: is of format 1, which can be evaluated but not gone on from; start another run from its "
            f"weights: init_from={source}"
        )
    if changes := tree_changes(Hierarchy.from_dict(state["tree"], f"{source}, its tree"), hierarchy):
        raise UserError(
            f"{config.hierarchy_file}: the tree has changed since {source} was written ({'; '.join(changes)}). A run "
            "that goes on must keep it: put the old tree back, or choose another exp_name"
        )
    theirs = config_from_dict(state["config"], f"{source}, its config", is_record=True)
    allowed = {*RESUMABLE_CHANGES, *["exp_name"] * is_new, *["n_epochs"] * (config.n_epochs > theirs.n_epochs)}
    changed = {key: f"{then!r} then, {now!r} now" for key, (now, then) in differences(config, theirs).items()}
    if fatal := [f"{key}: {change}" for key, change in changed.items() if key not in allowed]:
        raise UserError(
            f"{source} was started with another config ({'; '.join(fatal)}). A run that goes on must keep "
            "it (n_epochs alone may grow): give the same values, or choose another exp_name"
        )
    for split in lists:
        if state.get(split, lists[split]) != lists[split]:
            raise UserError(
                f"{config.ids_file(split.removesuffix('_ids'))} lists other photos now than when {source} was "
                "written; put the old list back, or choose another exp_name"
            )
    return theirs


def make_folders(config: Config) -> None:
    """Makes the folders of an experiment. Raises: OSError."""
    for path in (config.checkpoints_dir, config.copy_file.parent, config.tensorboard_dir):
        path.mkdir(parents=True, exist_ok=True)


def write_copies(config: Config, hierarchy: Hierarchy) -> None:
    """Config and tree of a run; from here on it can be resumed. Raises: OSError."""
    make_folders(config)
    write_json(hierarchy.to_dict(), config.copy_file.with_name("hierarchy.json"))
    save_config(config, config.copy_file)


def command(script: str, config: Config, *options: str) -> str:
    """What goes on with a run, to be typed where this process was started."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    return shlex.join([*start, _from_here(REPOSITORY / script), "--cfg", _from_here(config.copy_file), *options])


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def record_environment(folder: Path, device: torch.device, world: int) -> None:
    """Adds how this process was started to environment.json: one entry for each start and resume. Raises: OSError."""
    path, starts = folder / "environment.json", []
    if path.is_file():
        try:
            starts = read_json(path)
        except UserError as error:
            print(f"warning: {error}; it is begun anew", file=sys.stderr)
    write_json([*starts, environment(device) | {"processes": world}], path)


def environment(device: torch.device) -> dict:
    """What a result depends on beside its config: commit, versions, hardware, command."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "host": socket.gethostname(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


def commit() -> str:
    """The commit of the code, with "+changes" if files differ from it; "unknown" outside git."""
    try:
        run = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {cores()} cores"


def _has_results(config: Config) -> bool:
    """Whether a start of this name has left anything that a new one would destroy."""
    places = [(config.checkpoints_dir, "*.pt"), (config.tensorboard_dir, "events.out.*")]
    return config.copy_file.exists() or any(any(folder.glob(pattern)) for folder, pattern in places)


def _already_there(config: Config) -> str:
    changed = differences(config, load_config(config.copy_file)) if config.copy_file.exists() else {}
    other = f" with another config ({', '.join(changed)} differ)" if changed else ""
    return (
        f"experiment {config.exp_name!r} exists already{other} in {config.experiment_dir}. Go on with it: --resume; "
        "keep it and start another: exp_name=NEW_NAME; start anew and move it aside: --overwrite"
    )
