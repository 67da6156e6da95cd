"""Trains and scores a list of configs with several seeds each, and compares them.

    python tools/experiment.py configs/experiments/quick.json --jobs 2
    python tools/experiment.py configs/experiments/quick.json --only-report    # of what is finished so far, at any time

It can be stopped at any point, by Ctrl-C or worse, and started again with the same command: finished runs are
skipped, a run that was cut off goes on from its last checkpoint. Run bce of seed 0 in quick.json is the experiment
quick_bce_seed0. Its last weights are scored, by every decoding rule, on all val photos (n_val_photos is for the
validations while it trains), and are the only ones that are kept. The first run is the baseline.

FILE:  {"cfg": "configs/quickstart.json", "overrides": {"n_epochs": 8}, "seeds": [0, 1, 2],
        "search": {"lr": [0.0015, 0.003]},
        "runs": [{"name": "bce", "overrides": {"criterion": "bce"}},
                 {"name": "ce", "overrides": {"criterion": "ce"}, "seeds": [0, 1, 2, 3, 4]}]}

What stands beside "runs" holds for all of them; a run's own overrides are added to these, its other keys win.
With "search" each combination of its values is first trained without a sixth of the train photos, and scored on
these. The best one, with its best decoding rule, by the score that the config monitors, is what all seeds get. A run
whose "search" is another run's name takes that one's choice; with null it has none.
"""

import argparse
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config import REPOSITORY
from manage.comparison import compare
from tools.compare import write_report
from tools.experiment_runs import Entry, Run, read_entries
from utils.cli import cores, run_main
from utils.errors import UserError
from utils.locks import Lock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="a JSON file of runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    parser.add_argument("--out", type=Path, metavar="D", help="where the report goes (outputs/<name of FILE>)")
    parser.add_argument("--take-over", action="store_true", help="take the locks of another host, which must be gone")
    parser.add_argument("--only-report", action="store_true", help="run nothing, report on what is finished")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: expected at least 1")
    entries = read_entries(arguments.file)
    faults = [] if arguments.only_report else run_all(arguments, entries)
    write_results(arguments.file, entries, arguments.out or Path("outputs") / arguments.file.stem)
    return 1 if faults else 0


def choices(entries: Sequence[Entry]) -> dict[str, dict]:
    """What the final runs of an entry are given; without those that wait for a search."""
    own = {entry.name: entry.choice() for entry in entries}
    chosen = {entry.name: own[entry.search if isinstance(entry.search, str) else entry.name] for entry in entries}
    return {name: keys for name, keys in chosen.items() if keys is not None}


def final_runs(entries: Sequence[Entry], chosen: dict[str, dict]) -> list[Run]:
    """Those that wait for no search; the first seed of each entry before the second of any."""
    runs = [entry.finals(chosen[entry.name]) for entry in entries if entry.name in chosen]
    return [run for same_seed in itertools.zip_longest(*runs) for run in same_seed if run is not None]


def run_all(arguments: argparse.Namespace, entries: Sequence[Entry]) -> list[str]:
    """First what the choices need, then the final runs. Returns what went wrong."""
    logs = entries[0].logs
    lock = Lock(logs)
    try:
        logs.mkdir(parents=True, exist_ok=True)
        lock.take(arguments.take_over)  # one runner at a time for a file of runs
        for entry in entries:
            entry.logs.mkdir(parents=True, exist_ok=True)
            entry.write_lists()
    except OSError as error:
        raise UserError(f"{error.filename or logs}: cannot be written ({error.strerror})") from None
    try:
        faults = run_open([run for entry in entries for run in entry.tries()], arguments, logs)
        return faults + run_open(final_runs(entries, choices(entries)), arguments, logs)
    finally:
        lock.release()


def run_open(runs: Sequence[Run], arguments: argparse.Namespace, logs: Path) -> list[str]:
    """Runs what is not finished, so many jobs at a time. Returns a line for each run that failed.

    Raises: SystemExit when told to stop, after the trainings have saved.
    """
    waiting, active, faults = [run for run in runs if run.scored() is None], [], []
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished; logs are in {logs}", flush=True)
    told: list[int] = []  # signals; the handler does no more, so nothing can come between it and a start
    handlers = {n: signal.signal(n, lambda number, _: told.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    passed_on = 0
    try:
        while active or (waiting and not told):
            while waiting and len(active) < arguments.jobs and not told:
                active.append(Job(waiting.pop(0), max(1, cores() // arguments.jobs), logs, arguments.take_over))
            for job in active if len(told) > passed_on else []:
                job.stop()
            passed_on = len(told)
            for job, status in [(job, job.advance()) for job in active]:
                if status is not None:
                    active.remove(job)
                    if end := job.fault(status):
                        faults.append(end)
                    print(f"{end or f'finished {job.name}'}; {len(waiting) + len(active)} to go", flush=True)
            time.sleep(0.2)
    finally:
        for job in active:
            job.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if told:
        print("stopped; the same command goes on from here")
        raise SystemExit(128 + told[0])
    return faults


class Job:
    """One run: its training, then its evaluation, each in a process that writes into a log."""

    def __init__(self, run: Run, threads: int, logs: Path, take_over: bool = False) -> None:
        self.run, self.name, self.process = run, run.config.exp_name, None
        self.log = logs / f"{self.name}.log"
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ  # waiting threads sleep: utils/__init__.py
        resuming = ("--resume", "auto", *(["--take-over"] if take_over else []))
        # by the run's own copy: a rule or bias that is named here would be another one than the checkpoint's own
        scoring = ("--cfg", str(run.config.copy_file), "--checkpoint", "last", "--decode", "all", "--no-pictures")
        self.commands = [["train.py", *run.arguments, *resuming], ["evaluate.py", *scoring, "n_val_photos=null"]]

    def advance(self) -> int | None:
        """Starts what comes next; returns the exit status once there is nothing more, or something failed."""
        status = self.process.poll() if self.process else 0
        if status or not self.commands:
            return status
        if status == 0 and not Lock(self.run.config.experiment_dir).is_held():  # by a training that outlived its runner
            self._start(self.commands.pop(0))
        return None

    def fault(self, status: int) -> str:
        """What went wrong, once it has ended; nothing where it is scored."""
        if status or self.run.scored() is None:
            return f"{self.name}: ended with status {status}, see {self.log}"
        self.run.tidy()
        return ""

    def stop(self) -> None:
        """A training saves and ends; told twice, it ends at once."""
        self.commands.clear()
        if self.process is not None:
            self.process.terminate()

    def _start(self, command: Sequence[str]) -> None:
        command = [sys.executable, str(REPOSITORY / command[0]), *command[1:]]
        with open(self.log, "ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            # in a session of its own: Ctrl-C reaches us alone, and we pass it on once
            options = {"env": self.environment, "cwd": REPOSITORY, "start_new_session": True}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **options)


def write_results(file: Path, entries: Sequence[Entry], out: Path) -> None:
    """The comparison of all finished runs. Raises: UserError when none is finished, or `out` cannot be written."""
    chosen = choices(entries)
    runs = {run.config.exp_name: run for run in final_runs(entries, chosen)}
    finished = [experiment for run in runs.values() if (experiment := run.scored()) is not None]
    if not finished:
        raise UserError(f"{file}: no run is finished; the logs say why, or start it: python tools/experiment.py {file}")
    notes = [f"Made by `python tools/experiment.py {file}`; the last weights of each run are scored."]
    for name, keys in chosen.items():
        values = ", ".join(f"{key} {value}" for key, value in keys.items() if value != {})
        notes += [f"Chosen for {name} on the held-out photos: {values}."] if values else []
    if missing := sum(len(entry.seeds) for entry in entries) - len(finished):
        notes.append(f"{missing} runs are not finished.")
    comparison = compare(finished, names={name: run.entry for name, run in runs.items()})
    write_report(comparison, out, "experiments", f"Experiments: {file.stem}", notes)


if __name__ == "__main__":
    run_main(main)
