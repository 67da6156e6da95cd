"""Trains and evaluates a list of configs with several seeds each, then compares them.

    python tools/experiment.py configs/experiments/losses_cpu.json
    python tools/experiment.py configs/experiments/losses_cpu.json --jobs 2 --out docs
    python tools/experiment.py configs/experiments/losses_cpu.json --only-report    # of what is finished so far

It can be stopped at any point, by Ctrl-C or worse, and started again with the same command: finished runs are
skipped, a run that was cut off goes on from its last checkpoint. Writes experiments.json and experiments.md.

FILE:  {"checkpoint": "last",
        "runs": [{"name": "bce", "cfg": "configs/pascal_part_cpu.json", "overrides": {"criterion": "bce"},
                  "seeds": [0, 1, 2]}]}

Run bce of seed 0 in losses_cpu.json is the experiment losses_cpu_bce_seed0. "checkpoint" is what is scored: "best"
is chosen by its score on the val photos, "last" (the default) and "checkpoint_<epoch>" are not. A run is finished
when it is trained and scored at that checkpoint as it is on disk, with its config's decode and root_bias.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from configs.config import REPOSITORY, RESUMABLE_CHANGES, TYPES, Config, config_from_dict, differences, load_config
from manage.checkpoint import checkpoint_digest, load_checkpoint
from manage.comparison import Experiment, compare, criterion_name, load_experiment
from manage.experiment import Lock, config_copy, cores
from manage.tables import per_class
from tools.compare import to_record, write_report
from utils.cli import progress, run_main
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.locks import try_lock

KEYS = {"checkpoint", "runs"}
RUN_KEYS = {"name", "cfg", "overrides", "seeds"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="a JSON file of runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="D", help="default: %(default)s")
    parser.add_argument("--only-report", action="store_true", help="run nothing, report on what is finished")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: expected at least 1")
    checkpoint, runs = read_runs(arguments.file)
    if arguments.only_report:
        write_results(arguments.file, runs, checkpoint, arguments.out)
        return 0
    lock = _lock(runs[0].config, arguments.file)
    try:
        faults = Runner(runs, checkpoint, arguments.jobs, lock.path.parent).run()
        for fault in faults:
            print(fault, file=sys.stderr)
        write_results(arguments.file, runs, checkpoint, arguments.out)
    finally:
        lock.release()
    return 1 if faults else 0


# ---- the file of runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One config with one seed."""

    name: str
    cfg: str
    overrides: dict[str, Any]  # with exp_name and seed
    config: Config

    @property
    def arguments(self) -> list[str]:
        """What train.py and evaluate.py are given."""
        return ["--cfg", self.cfg, *(f"{key}={_as_text(key, value)}" for key, value in self.overrides.items())]

    @property
    def epochs_done(self) -> int:
        path = self.config.experiment_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    @property
    def is_trained(self) -> bool:
        """The last epoch's checkpoint is there, and `last`, which is written after it."""
        files = [self.config.checkpoints_dir / f"{name}.pt" for name in (f"checkpoint_{self.config.n_epochs}", "last")]
        if not all(file.is_file() for file in files):
            return False
        kept, last = (file.stat().st_mtime_ns for file in files)
        return last >= kept

    @property
    def is_in_use(self) -> bool:
        """A training holds its lock: one that outlived the runner that started it."""
        try:
            with open(self.config.experiment_dir / ".lock", "r+", encoding="utf-8") as file:
                return not try_lock(file)
        except OSError:  # none was taken yet; or none can be, which train.py will say
            return False

    def evaluation(self, checkpoint: str) -> Experiment | None:
        """Its scores; None unless they are whole, of the finished run, and decoded as its config says now."""
        try:
            experiment = load_experiment(self.config.experiment_dir, checkpoint)
        except UserError:
            return None
        decoding = (experiment.rule, experiment.config["root_bias"])
        is_wanted = decoding == (self.config.decode, self.config.root_bias)
        return experiment if is_wanted and self._is_final(experiment.record, checkpoint) else None

    def _is_final(self, record: dict[str, Any], checkpoint: str) -> bool:
        """Whether scores.json is about the checkpoint as the finished run left it."""
        path, last, epoch = self.config.checkpoints_dir / f"{checkpoint}.pt", self.config.n_epochs, record["epoch"]
        expected = {"best": epoch, "last": last, f"checkpoint_{epoch}": epoch}.get(checkpoint)
        if epoch != expected or not (epoch == last or self.is_trained):
            return False
        scored, on_disk = record.get("checkpoint_sha256"), checkpoint_digest(path)
        if scored and on_disk:
            return scored == on_disk
        # older scores hold no digest: of all checkpoints, only the best is written at more than one epoch
        return checkpoint != "best" or epoch in (last, _epoch_of(path))


def _epoch_of(checkpoint: Path) -> int | None:
    """None where it is missing or damaged."""
    try:
        return load_checkpoint(checkpoint)["epoch"]
    except UserError:
        return None


def read_runs(path: Path) -> tuple[str, list[Run]]:
    """The checkpoint to score and all runs, each checked down to its last config key before the first one starts.

    Raises: UserError naming the file, the run and the key.
    """
    content = read_json(path)
    _check_keys(content, KEYS, {"runs"}, str(path))
    checkpoint = content.get("checkpoint", "last")
    if not isinstance(checkpoint, str) or not re.fullmatch(r"best|last|checkpoint_\d+", checkpoint):
        raise UserError(f"{path}: 'checkpoint' is {checkpoint!r}; expected best, last or checkpoint_<epoch>")
    entries = content["runs"]
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: 'runs' must be a list with at least one run")
    runs = [run for number, entry in enumerate(entries) for run in _read_entry(path, entry, f"{path}: runs[{number}]")]
    names = [run.config.exp_name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two runs are called {name!r}; give each its own 'name'")
    for run in runs:
        _check_is_kept(checkpoint, run, path)
        _check_same_config(run)
    return checkpoint, runs


def _read_entry(path: Path, entry: Any, where: str) -> list[Run]:
    """The runs of one entry, one a seed."""
    _check_keys(entry, RUN_KEYS, {"name", "cfg", "seeds"}, where)
    name, cfg, seeds = entry["name"], entry["cfg"], entry["seeds"]
    overrides = entry.get("overrides", {})
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}: 'name' is {name!r}; expected at most 41 letters, digits, '.', '_' and '-'")
    where = f"{where} ({name})"
    if not isinstance(cfg, str):
        raise UserError(f"{where}: 'cfg' is {cfg!r}; expected the path of a config")
    if not isinstance(overrides, dict) or {"exp_name", "seed"} & set(overrides):
        raise UserError(f"{where}: 'overrides' must be an object of config keys other than exp_name and seed")
    is_list = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not is_list or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: 'seeds' is {seeds!r}; expected a list of different whole numbers, such as [0, 1, 2]")
    source = REPOSITORY / cfg
    values = read_json(source)
    if not isinstance(values, dict) or "runs" in values:
        raise UserError(f"{where}: {source} is not a config; 'cfg' must name a file such as configs/quickstart.json")
    runs = []
    for seed in seeds:
        own = overrides | {"exp_name": f"{path.stem}_{name}_seed{seed}", "seed": seed}
        runs.append(Run(name, cfg, own, config_from_dict(values | own, f"{where}, {cfg} with its overrides")))
    return runs


def _check_is_kept(checkpoint: str, run: Run, path: Path) -> None:
    """Raises: UserError for a numbered checkpoint that the run will not have when it ends."""
    config = run.config
    saved = [n for n in range(1, config.n_epochs + 1) if n % config.save_epoch == 0 or n == config.n_epochs]
    kept = [f"checkpoint_{number}" for number in saved[-config.keep :]]
    if checkpoint not in ("best", "last", *kept) and not (config.checkpoints_dir / f"{checkpoint}.pt").is_file():
        raise UserError(
            f"{path}: 'checkpoint' is {checkpoint!r}, but {config.exp_name} ends with {', '.join(kept)} (n_epochs "
            f"{config.n_epochs}, save_epoch {config.save_epoch}, keep {config.keep}); name one of them, or best or last"
        )


def _check_same_config(run: Run) -> None:
    """Raises: UserError when an experiment of that name was started with another config."""
    copy = config_copy(run.config)
    if not copy.is_file():
        return
    changed = differences(run.config, load_config(copy))
    fatal = [key for key in changed if key not in RESUMABLE_CHANGES]
    if fatal:
        raise UserError(
            f"experiment {run.config.exp_name!r} exists with another config ({', '.join(fatal)} differ) in "
            f"{run.config.experiment_dir}; rename the run, or move that folder away"
        )


def _check_keys(record: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with the keys {', '.join(sorted(known))}")
    if unknown := sorted(set(record) - known):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
    if missing := sorted(required - set(record)):
        raise UserError(f"{where}: the key {missing[0]!r} is missing")


def _as_text(key: str, value: Any) -> str:
    """The value as an override: texts as they are, everything else as JSON."""
    return value if TYPES[key] is str else json.dumps(value)


# ---- running -----------------------------------------------------------------------------------------------------


class Runner:
    """Runs what is not finished, `jobs` at a time, each in processes of its own that write into a log."""

    def __init__(self, runs: Sequence[Run], checkpoint: str, jobs: int, logs: Path) -> None:
        self.runs, self.checkpoint, self.jobs, self.logs = runs, checkpoint, jobs, logs
        self.processes: set[subprocess.Popen] = set()
        self.guard = threading.RLock()  # a second signal may come while the first is being passed on
        self.signal: int | None = None

    def run(self) -> list[str]:
        """Returns a line for each run that failed.

        Raises: SystemExit when told to stop, after the trainings have saved.
        """
        open_runs = [run for run in self.runs if run.evaluation(self.checkpoint) is None]
        print(f"{len(self.runs)} runs, {len(self.runs) - len(open_runs)} of them finished; logs are in {self.logs}")
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = [pool.submit(self._finish, run) for run in open_runs]
                self._watch(futures)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.signal is not None:
            print("stopped; the same command goes on from here")
            raise SystemExit(128 + self.signal)
        return [fault for future in futures if (fault := future.result())]

    def _watch(self, futures: Sequence) -> None:
        """A bar of epochs until all is done."""
        total = sum(run.config.n_epochs for run in self.runs)
        with progress(total=total, desc="epochs", unit="epoch", initial=self._epochs_done()) as bar:
            while wait(futures, timeout=2).not_done:
                bar.update(self._epochs_done() - bar.n)
            bar.update(self._epochs_done() - bar.n)

    def _epochs_done(self) -> int:
        return sum(run.epochs_done for run in self.runs)

    def _finish(self, run: Run) -> str | None:
        """Trains and evaluates; returns what went wrong, if anything."""
        name = run.config.exp_name
        self._wait_until_free(run)
        if not run.is_trained:
            resume = ["--resume"] if config_copy(run.config).is_file() else []
            status = self._call("train.py", run, resume)
            if self.signal is not None:
                return None
            if status:
                return f"{name}: training ended with status {status}; see {self._log(run)}"
        options = ["--checkpoint", self.checkpoint, "--decode", "all", "--no-pictures"]
        status = self._call("evaluate.py", run, options)
        if self.signal is not None:
            return None
        if status or run.evaluation(self.checkpoint) is None:
            return f"{name}: evaluation ended with status {status}; see {self._log(run)}"
        tqdm.write(f"finished {name}")
        return None

    def _wait_until_free(self, run: Run) -> None:
        if run.is_in_use:
            tqdm.write(f"waiting for {run.config.exp_name}, which a process of an earlier start is training")
        while run.is_in_use and self.signal is None:
            time.sleep(1)

    def _call(self, script: str, run: Run, options: Sequence[str]) -> int:
        command = [sys.executable, str(REPOSITORY / script), *run.arguments, *options]
        with open(self._log(run), "ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            with self.guard:
                if self.signal is not None:  # between two processes: do not start another
                    return 128 + self.signal
                # a session of its own: Ctrl-C reaches us alone, and we pass it on once
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    cwd=REPOSITORY,
                    start_new_session=True,
                )
                self.processes.add(process)
            status = process.wait()
            with self.guard:
                self.processes.discard(process)
            return status

    def _environment(self) -> dict[str, str]:
        """Several jobs share the cores instead of each taking all of them."""
        if self.jobs == 1:
            return dict(os.environ)
        return {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs))} | os.environ

    def _log(self, run: Run) -> Path:
        return self.logs / f"{run.config.exp_name}.log"

    def _on_signal(self, number: int, _frame) -> None:
        """Passes the signal on; trainings save and end. Runs in the main thread, which never holds the guard."""
        self.signal = number
        with self.guard:
            for process in self.processes:
                process.send_signal(signal.SIGTERM)


def _lock(config: Config, file: Path) -> Lock:
    """One runner at a time for a file of runs; its folder holds the logs too.

    Raises: UserError that names the runner that is at work.
    """
    folder = config.root / "experiments" / "logs" / file.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        lock.take()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return lock


# ---- results -----------------------------------------------------------------------------------------------------


def write_results(file: Path, runs: Sequence[Run], checkpoint: str, out: Path) -> None:
    """experiments.json, experiments.md and its pictures, from the folders of the finished runs.

    Raises: UserError when none is finished, or `out` cannot be written.
    """
    evaluated = [(run, experiment) for run in runs if (experiment := run.evaluation(checkpoint)) is not None]
    if not evaluated:
        raise UserError(f"{file}: no run is finished; the logs say why, or start it: python tools/experiment.py {file}")
    finished = {experiment.name for _, experiment in evaluated}
    unfinished = [run.config.exp_name for run in runs if run.config.exp_name not in finished]
    comparison = compare([experiment for _, experiment in evaluated])
    command = f"python tools/experiment.py {_relative(file)}"
    notes = [f"Made by `{command}`; each run is scored at its checkpoint `{checkpoint}`."]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}.")
    for path in write_report(comparison, out, "experiments", f"Experiments: {file.stem}", notes):
        print(f"wrote {path}")
    record = {
        "command": command,
        "checkpoint": checkpoint,
        "unfinished": unfinished,
        "runs": [run_record(run, experiment) for run, experiment in evaluated],
        "comparison": to_record(comparison),
    }
    write_json(record, out / "experiments.json")
    print(f"wrote {out / 'experiments.json'}")


def run_record(run: Run, experiment: Experiment) -> dict[str, Any]:
    """One run as plain JSON types; scores in [0, 1], times in seconds."""
    classes: dict[str, dict[str, float | None]] = {}
    for level, name, iou in per_class(experiment.result):
        classes.setdefault(f"level{level}", {})[name] = iou
    return {
        "name": run.name,
        "experiment": experiment.name,
        "criterion": criterion_name(experiment.config["criterion"]),
        "seed": experiment.seed,
        "commit": experiment.said("commit"),
        "hardware": experiment.said("hardware"),
        "wall_s": experiment.curves[-1]["train_seconds"],
        "evaluation_s": experiment.record["seconds"],
        "epoch": experiment.record["epoch"],
        "photos": experiment.record["photos"],
        "decode": experiment.rule,
        **experiment.scores,
        "per_class": classes,
        "rules": experiment.record["rules"],
        "command": shlex.join(["python", "train.py", *run.arguments]),
        "config": experiment.config,
    }


def _relative(path: Path) -> str:
    """As seen from the repository, where it lies inside."""
    absolute = path.resolve()
    return str(absolute.relative_to(REPOSITORY) if absolute.is_relative_to(REPOSITORY) else path)


if __name__ == "__main__":
    run_main(main)
