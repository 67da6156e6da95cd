"""The folders of one experiment: lock, config, environment record, curves."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import PIL
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as summarise_hparams

from configs.config import REPOSITORY, RESUMABLE_CHANGES, Config, differences, load_config, save_config
from manage.checkpoint import newer_than
from utils.errors import UserError
from utils.files import names_aside, remove_unfinished, set_aside, write_json, write_whole
from utils.hierarchy import Hierarchy
from utils.locks import try_lock

LINES = "metrics.jsonl"


class Lock:
    """One process (or one torchrun) at a time in an experiment's folder.

    The lock is the kernel's, so it goes with its process however that ends. It is a POSIX lock, which loader
    processes do not inherit: they may outlive a killed training for seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.file = None

    def take(self) -> None:
        """Raises: UserError that names the owner, or says why nothing can be locked here."""
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - held until release
        owner = self._owner()
        who = "another process"  # it has not signed yet
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
        try:
            is_ours = try_lock(self.file)
        except OSError as error:
            self._leave()
            raise UserError(
                f"{self.path}: cannot be locked ({error.strerror}); set root_dir to a folder on a disk that knows locks"
            ) from None
        if not is_ours:
            self._leave()
            raise UserError(f"{self.path.parent} is in use by {who}; wait for it, stop it, or choose another exp_name")
        if owner and owner.get("host") != me["host"]:  # file locks need not reach across hosts
            self._leave()
            raise UserError(f"{self.path.parent} was locked by {who}; if that one is gone, delete {self.path}")
        if owner:
            print(f"the lock of process {owner.get('pid')}, which is gone, is taken over")
        self.file.truncate(0)
        self.file.write(json.dumps(me))
        self.file.flush()

    def release(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.truncate(0)
            self._leave()

    def _leave(self) -> None:
        """Closes the file and leaves in it what stands there, which may be the owner's."""
        self.file.close()
        self.file = None

    def _owner(self) -> dict:
        self.file.seek(0)
        try:
            owner = json.loads(self.file.read() or "{}")
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}


class Curves:
    """TensorBoard and metrics.jsonl. Both only grow, so a resume cuts them back to their length at the checkpoint.

    A full or vanished disk silences them with a line; it does not end a training.
    """

    def __init__(self, experiment_dir: Path, tensorboard_dir: Path, journal: dict[str, int] | None = None) -> None:
        self.lines, self.events = experiment_dir / LINES, tensorboard_dir
        self._cut_back(journal or {})
        self.writer = SummaryWriter(str(tensorboard_dir))
        self.is_silent = False

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._try(lambda: [self.writer.add_scalar(name, value, step) for name, value in values.items()])

    def picture(self, name: str, image: numpy.ndarray, step: int) -> None:
        """Shape: image (H, W, 3) uint8."""
        self._try(lambda: self.writer.add_image(name, image, step, dataformats="HWC"))

    def hparams(self, values: dict, curves: Sequence[str]) -> None:
        """Config against the last value of these curves, in TensorBoard's HParams tab."""
        plain = {k: v if type(v) in (int, float, str) else str(v) for k, v in values.items()}  # True is no number there
        for summary in summarise_hparams(plain, dict.fromkeys(curves, 0.0)):
            self._try(lambda summary=summary: self.writer.file_writer.add_summary(summary))

    def line(self, record: dict) -> None:
        """One line of metrics.jsonl."""

        self._try(lambda: self._append(json.dumps(record) + "\n"))

    def journal(self) -> dict[str, int]:
        """The length in bytes of every file, for the checkpoint."""
        self._try(self.writer.flush)
        return {path.name: path.stat().st_size for path in curve_files(self.lines.parent, self.events)}

    def close(self) -> None:
        self._try(self.writer.close)

    def _append(self, line: str) -> None:
        """Adds the whole line or nothing."""
        with open(self.lines, "a", encoding="utf-8") as file:
            before = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.lines, before)
                raise

    def _cut_back(self, journal: dict[str, int]) -> None:
        for path in curve_files(self.lines.parent, self.events):
            if path.name not in journal:
                path.unlink()  # written after the checkpoint, and about to be written again
            elif path.stat().st_size > journal[path.name]:
                os.truncate(path, journal[path.name])

    def _try(self, action) -> None:
        try:
            action()
        except OSError as error:
            if not self.is_silent:
                print(f"warning: curves cannot be written ({error}); training goes on without them", file=sys.stderr)
            self.is_silent = True


def curve_files(experiment_dir: Path, tensorboard_dir: Path) -> list[Path]:
    """metrics.jsonl and TensorBoard's files, those that are there."""
    files = (experiment_dir / LINES, *tensorboard_dir.glob("events.out.tfevents.*"))
    return [path for path in files if path.is_file()]


class NoCurves:
    """Takes everything and writes nothing: the curves of all processes but the first."""

    def scalars(self, *_) -> None: ...

    def picture(self, *_) -> None: ...

    def hparams(self, *_) -> None: ...

    def line(self, *_) -> None: ...

    def journal(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


def create_experiment(config: Config, hierarchy: Hierarchy, overwrite: bool = False) -> Lock:
    """Makes the folders of a new experiment and takes its lock.

    Raises: UserError when the experiment exists (unless `overwrite`, which moves it aside) or cannot be written.
    """
    lock = Lock(config.experiment_dir)
    try:
        config.experiment_dir.mkdir(parents=True, exist_ok=True)
        lock.take()
        if _has_results(config):
            if not overwrite:
                raise UserError(_already_there(config))
            _move_aside(config)
            lock.release()  # it went aside with its folder
            config.experiment_dir.mkdir(parents=True)
            lock.take()
        write_folders(config, hierarchy)
    except OSError as error:
        lock.release()
        raise _not_writable(config, error) from None
    except UserError:
        lock.release()
        raise
    return lock


def open_experiment(config: Config) -> Lock:
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
        lock.take()
        config.tensorboard_dir.mkdir(parents=True, exist_ok=True)
        config.checkpoints_dir.mkdir(exist_ok=True)
        remove_unfinished(config.checkpoints_dir)
    except OSError as error:
        lock.release()
        raise _not_writable(config, error) from None
    return lock


def rewind(config: Config, file: Path, state: dict) -> None:
    """Sets aside what an experiment holds beyond a checkpoint that it goes back to; call it before curves are cut.

    The curves are copied, the newer checkpoints moved, the newest first, and `file` becomes `last`. Wherever this is
    cut off, the newest checkpoint that remains has all its curves.
    Raises: UserError when the disk does not take it; nothing is lost then.
    """
    newer = newer_than(state, config.checkpoints_dir)
    if not newer:
        return
    aside, curves_aside = names_aside([config.experiment_dir, config.tensorboard_dir])
    names = ", ".join(path.name for path in newer)
    print(f"newer than {file.name}: {names}; set aside with the curves in {aside} and {curves_aside}", flush=True)
    checkpoints_aside = aside / config.checkpoints_dir.name
    last = config.checkpoints_dir / "last.pt"
    try:
        checkpoints_aside.mkdir(parents=True)
        curves_aside.mkdir()
        for path in curve_files(config.experiment_dir, config.tensorboard_dir):
            shutil.copy2(path, aside if path.name == LINES else curves_aside)
        for path in newer:
            shutil.move(path, checkpoints_aside)
        if not last.is_file():
            write_whole(file.read_bytes(), last)
    except OSError as error:
        raise _not_writable(config, error) from None


def check_resumable(config: Config, theirs: Config, what: str) -> dict[str, tuple]:
    """The keys that differ, all of them without influence on what is computed.

    Raises: UserError when another key differs.
    """
    changed = differences(config, theirs)
    fatal = {key: pair for key, pair in changed.items() if key not in RESUMABLE_CHANGES}
    if fatal:
        listing = "; ".join(f"{key}: {theirs!r} then, {ours!r} now" for key, (ours, theirs) in fatal.items())
        raise UserError(
            f"{what} was started with another config ({listing}). A run that goes on must keep "
            "it: give the same values, or choose another exp_name"
        )
    return changed


def write_folders(config: Config, hierarchy: Hierarchy) -> None:
    """Makes the folders of an experiment, with its config and tree. Raises: OSError."""
    for path in (config.checkpoints_dir, config_copy(config).parent, config.tensorboard_dir):
        path.mkdir(parents=True, exist_ok=True)
    write_json(hierarchy.to_dict(), config_copy(config).with_name("hierarchy.json"))
    save_config(config, config_copy(config))


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
