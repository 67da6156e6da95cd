"""The folders of one experiment: lock, config, environment record."""

import json
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
    without_gone,
)
from manage.checkpoint import find_checkpoint, load_checkpoint, newer_than, newest_valid
from manage.network import check_same_network, check_same_tree
from utils.errors import UserError
from utils.files import remove_unfinished, set_aside, write_json
from utils.hierarchy import Hierarchy
from utils.locks import Lock


def create_experiment(config: Config, overwrite: bool = False, take_over: bool = False) -> Lock:
    """Makes the folders of a new experiment and takes its lock; `write_copies` follows.

    Raises: UserError when the experiment exists (unless `overwrite`, which moves it aside) or cannot be written.
    """
    lock = Lock(config.experiment_dir)
    try:
        config.experiment_dir.mkdir(parents=True, exist_ok=True)
        lock.take(take_over)
        if _has_results(config):
            if not overwrite:
                raise UserError(_already_there(config))
            lock.release()
            _move_aside(config)
            config.experiment_dir.mkdir(parents=True)
            lock.take()
        make_folders(config)
    except OSError as error:
        lock.release()
        raise _not_writable(config, error) from None
    except UserError:
        lock.release()
        raise
    return lock


def open_experiment(config: Config, take_over: bool = False) -> Lock:
    """Takes the lock of an experiment that is to be resumed, after its config has been compared.

    Raises: UserError when there is none, or when a key that changes the results differs.
    """
    if not config_copy(config).exists():
        raise UserError(f"{config.experiment_dir}: nothing to resume there; start without --resume")
    changed = check_resumable(config, load_config(config_copy(config)), f"experiment {config.exp_name!r}")
    for key, (ours, theirs) in changed.items():
        print(f"changed since the start: {key} {theirs!r} -> {ours!r}")
    lock = Lock(config.experiment_dir)
    try:
        lock.take(take_over)
        make_folders(config)
        remove_unfinished(config.checkpoints_dir)
        if "n_epochs" in changed:
            save_config(config, config_copy(config))
    except OSError as error:
        lock.release()
        raise _not_writable(config, error) from None
    return lock


def check_resumable(config: Config, theirs: Config, what: str, may_differ: str | None = None) -> dict[str, tuple]:
    """The keys that differ, all of them without influence on what is computed; n_epochs may grow.

    Raises: UserError when another key differs.
    """
    changed = differences(config, theirs)
    allowed = {*RESUMABLE_CHANGES, may_differ, *["n_epochs"] * (config.n_epochs > theirs.n_epochs)}
    fatal = {key: pair for key, pair in changed.items() if key not in allowed}
    if fatal:
        listing = "; ".join(f"{key}: {theirs!r} then, {ours!r} now" for key, (ours, theirs) in fatal.items())
        raise UserError(
            f"{what} was started with another config ({listing}). A run that goes on must keep "
            "it (n_epochs alone may grow): give the same values, or choose another exp_name"
        )
    return changed


def checkpoint_to_resume(config: Config, path: str, say=print) -> Path | None:
    """The newest whole checkpoint of an experiment, None where none was written; `path` must name no other.

    Raises: UserError that says how to go on from an older one.
    """
    folder = config.checkpoints_dir
    if not path:
        return newest_valid(folder, say)
    file = find_checkpoint(path, folder, config.root)
    if newer := newer_than(load_checkpoint(file), folder):
        raise UserError(
            f"{file} is older than {newer[0].name}, and a run goes on from its newest checkpoint only. Go on from "
            f"there under a new name, which leaves this run as it is: exp_name=NEW --resume {file}"
        )
    return file


def check_same_run(
    config: Config, hierarchy: Hierarchy, state: dict, source: str, digests: dict[str, str], is_new: bool
) -> Config:
    """The config of a checkpoint that a run can go on from; under a new name, if it is `is_new`.

    Raises: UserError where config, tree, network or lists of photos (`digests`) differ.
    """
    if state["format"] < 2:
        raise UserError(
            f"{source}: is of format 1, which can be evaluated but not gone on from; start another run from its "
            f"weights: init_from={source}"
        )
    check_same_network(config, hierarchy, state, source)
    check_same_tree(config, hierarchy, state, source)
    theirs = config_from_dict(without_gone(state["config"]), f"{source}, its config")
    check_resumable(config, theirs, source, may_differ="exp_name" if is_new else None)
    for key, digest in digests.items():
        if state.get(key, digest) != digest:
            raise UserError(
                f"{config.ids_file(key.removesuffix('_ids'))} lists other photos now than when {source} was "
                "written; put the old list back, or choose another exp_name"
            )
    return theirs


def make_folders(config: Config) -> None:
    """Makes the folders of an experiment. Raises: OSError."""
    for path in (config.checkpoints_dir, config_copy(config).parent, config.tensorboard_dir):
        path.mkdir(parents=True, exist_ok=True)


def write_copies(config: Config, hierarchy: Hierarchy) -> None:
    """Config and tree of a run; from here on it can be resumed. Raises: OSError."""
    make_folders(config)
    write_json(hierarchy.to_dict(), config_copy(config).with_name("hierarchy.json"))
    save_config(config, config_copy(config))


def command(script: str, config: Config, *options: str) -> str:
    """What goes on with a run, to be typed where this process was started."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    return shlex.join([*start, _from_here(REPOSITORY / script), "--cfg", _from_here(config_copy(config)), *options])


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def config_copy(config: Config) -> Path:
    return config.experiment_dir / "configs" / f"{config.exp_name}.json"


def record_environment(folder: Path, device: torch.device, world: int) -> dict:
    """Adds how this process was started to environment.json: one entry for each start and resume."""
    path = folder / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if not isinstance(starts, list):
            raise ValueError
    except ValueError:
        print(f"warning: {path} is damaged and begun anew", file=sys.stderr)
        starts = []
    record = environment(device) | {"processes": world}
    try:
        write_json([*starts, record], path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space, or set another root_dir") from None
    return record


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


def cores() -> int:
    """Cores this process may use, which on shared machines is less than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_results(config: Config) -> bool:
    """Whether a start of this name has left anything that a new one would destroy."""
    places = [(config.checkpoints_dir, "*.pt"), (config.tensorboard_dir, "events.out.*")]
    return config_copy(config).exists() or any(any(folder.glob(pattern)) for folder, pattern in places)


def _already_there(config: Config) -> str:
    copy = config_copy(config)
    changed = differences(config, load_config(copy)) if copy.exists() else {}
    other = f" with another config ({', '.join(changed)} differ)" if changed else ""
    return (
        f"experiment {config.exp_name!r} exists already{other} in {config.experiment_dir}. Go on with it: --resume; "
        "keep it and start another: exp_name=NEW_NAME; start anew and move it aside: --overwrite"
    )


def _not_writable(config: Config, error: OSError) -> UserError:
    place = error.filename or config.experiment_dir
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(f"{place}: a file is where a folder is to be made; move it, or choose another exp_name")
    return UserError(f"{place}: cannot be written ({error.strerror}); set root_dir to a folder you may write to")


def _move_aside(config: Config) -> None:
    """Renames the experiment's two folders to names that are free. Raises: OSError."""
    for aside in set_aside(config.experiment_dir, config.tensorboard_dir):
        print(f"moved {aside.name.partition('.old-')[0]} to {aside}")
