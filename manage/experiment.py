"""The folders of one experiment: lock, config, environment record."""

import os
import platform
import re
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

from configs.config import REPOSITORY, RESUMABLE_CHANGES, Config, config_from_dict, differences, save_config
from manage.network import tree_changes
from utils.cli import cores
from utils.errors import UserError
from utils.files import read_json, remove_unfinished, set_aside, write_json
from utils.hierarchy import Hierarchy
from utils.locks import Lock


def create_experiment(config: Config, lock: Lock, overwrite: bool = False, take_over: bool = False) -> None:
    """Makes the folder of a new experiment and takes its lock; `write_records` follows.

    Raises: OSError; UserError when the experiment exists, unless `overwrite` moves it aside.
    """
    config.experiment_dir.mkdir(parents=True, exist_ok=True)
    lock.take(take_over)
    results = [config.copy_file, *config.checkpoints_dir.glob("*.pt"), *config.tensorboard_dir.glob("*")]
    if any(path.exists() for path in results):
        if not overwrite:
            raise UserError(
                f"experiment {config.exp_name!r} exists already in {config.experiment_dir}. Go on with it: --resume; "
                "keep it and start another: exp_name=NEW_NAME; start anew and move it aside: --overwrite"
            )
        lock.release()
        for aside in set_aside(config.experiment_dir, config.tensorboard_dir):
            print(f"moved {aside.name.partition('.old-')[0]} to {aside}")
        config.experiment_dir.mkdir(parents=True)
        lock.take()
    config.checkpoints_dir.mkdir(exist_ok=True)


def open_experiment(config: Config, lock: Lock, take_over: bool = False) -> None:
    """Takes the lock of an experiment that is to be resumed. Raises: OSError; UserError when there is none."""
    if not config.copy_file.exists():
        raise UserError(f"{config.experiment_dir}: nothing to resume there; start without --resume")
    lock.take(take_over)
    remove_unfinished(config.checkpoints_dir)


def check_same_run(config: Config, hierarchy: Hierarchy, state: dict, source: str, lists: dict) -> None:
    """Whether a run can go on from a checkpoint.

    Raises: UserError where the tree, a key that changes results, or the `lists` of photos differ; n_epochs may grow.
    """
    theirs = config_from_dict(state["config"], f"{source}, its config", is_record=True)
    allowed = {*RESUMABLE_CHANGES, *["n_epochs"] * (config.n_epochs > theirs.n_epochs)}
    changed = {key: pair for key, pair in differences(config, theirs).items() if key not in allowed}
    faults = [f"{key}: {then!r} then, {now!r} now" for key, (now, then) in changed.items()]
    tree = Hierarchy.from_dict(state["tree"], f"{source}, its tree")
    faults += [f"the tree {config.hierarchy_file} has other {part}" for part in tree_changes(tree, hierarchy)]
    others = [key for key in lists if state.get(key, lists[key]) != lists[key]]
    places = {"labels": config.labels_dir} | {f"{s}_ids": config.ids_file(s) for s in ("train", "val")}
    faults += [f"other {'labels' if key == 'labels' else 'photos'} in {places[key]}" for key in others]
    if faults:
        raise UserError(
            f"{source} was started with another config, tree or list of photos ({'; '.join(faults)}). A run that goes "
            "on must keep them (n_epochs alone may grow): put the old ones back, or start anew (exp_name, init_from)"
        )


def write_records(config: Config, hierarchy: Hierarchy, device: torch.device, world: int) -> None:
    """All folders; how this process was started, one entry a start; tree and config: from here on it can be resumed.

    Raises: OSError.
    """
    for folder in (config.checkpoints_dir, config.copy_file.parent, config.tensorboard_dir):
        folder.mkdir(parents=True, exist_ok=True)
    path = config.experiment_dir / "environment.json"
    starts = read_json(path) if path.is_file() else []
    write_json([*starts, environment(device) | {"processes": world}], path)
    write_json(hierarchy.to_dict(), config.copy_file.with_name("hierarchy.json"))
    save_config(config, config.copy_file)


# --- what stands in records and on the screen ---
def command(script: str, config: Config, *options: str) -> str:
    """What goes on with a run, to be typed where this process was started."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    words = [*start, REPOSITORY / script, "--cfg", config.copy_file, *options]
    return shlex.join(str(word).removeprefix(f"{Path.cwd()}{os.sep}") for word in words)


def environment(device: torch.device) -> dict:
    """What a result depends on beside its config: commit, versions, hardware, command."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": _commit(),
        "host": socket.gethostname(),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, numpy)},
        "pillow": PIL.__version__,
    }


def _commit() -> str:
    """The commit of the code, with "+changes" if files differ from it; "unknown" outside git."""
    try:
        run = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")  # on Linux
    model = re.search(r"model name\s*: (.*)", known.read_text() if known.is_file() else "")
    return f"{model[1] if model else platform.machine()}, {cores()} cores"
