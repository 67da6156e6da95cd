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
these. The best one, with its best decoding rule, by the score that the config monitors, is what all seeds get.
"""

import argparse
import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.config import REPOSITORY
from manage.comparison import compare
from manage.distributed import on_main_only
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
    return {entry.name: keys for entry in entries if (keys := entry.choice()) is not None}


def final_runs(entries: Sequence[Entry], chosen: dict[str, dict]) -> list[Run]:
    """Those that wait for no search; the first seed of each entry before the second of any."""
    runs = [entry.finals(chosen[entry.name]) for entry in entries if entry.name in chosen]
    return [run for same_seed in itertools.zip_longest(*runs) for run in same_seed if run is not None]


def run_all(arguments: argparse.Namespace, entries: Sequence[Entry]) -> list[str]:
    """First what the choices need, then the final runs. Returns what went wrong."""
    lock = Lock(entries[0].logs)
    on_main_only(prepare, entries, lock, arguments.take_over)
    runner = Runner(arguments.jobs, lock.folder, arguments.take_over)
    handlers = {number: signal.signal(number, runner.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        runner.run([run for entry in entries for run in entry.tries()])
        runner.run(final_runs(entries, choices(entries)))
        return runner.faults
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        lock.release()


def prepare(entries: Sequence[Entry], lock: Lock, take_over: bool) -> None:
    """The folder of logs, which is of one runner at a time, and the lists of held-out photos. Raises: OSError."""
    lock.folder.mkdir(parents=True, exist_ok=True)
    lock.take(take_over)
    for entry in entries:
        entry.logs.mkdir(parents=True, exist_ok=True)
        entry.write_lists()


class Runner:
    """Runs what is not finished, so many jobs at a time, each in processes that write into a log."""

    def __init__(self, jobs: int, logs: Path, take_over: bool) -> None:
        self.jobs, self.logs, self.take_over = jobs, logs, take_over
        self.told: list[int] = []  # signals
        self.faults: list[str] = []
        self.active: set[subprocess.Popen] = set()
        self.turn = threading.RLock()  # no signal comes between a start and its entry in `active`

    def run(self, runs: Sequence[Run]) -> None:
        """Raises: SystemExit when told to stop, after the trainings have saved."""
        waiting = [run for run in runs if run.scored() is None]
        print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished; logs are in {self.logs}", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.finish, waiting))
        if self.told:
            print("stopped; the same command goes on from here")
            raise SystemExit(128 + self.told[0])

    def stop(self, number: int, _frame: object) -> None:
        """A training saves and ends; told twice, it ends at once."""
        with self.turn:
            self.told.append(number)
            for process in self.active:
                process.terminate()

    def finish(self, run: Run) -> None:
        """Trains and scores."""
        name, log = run.config.exp_name, self.logs / f"{run.config.exp_name}.log"
        while not self.told and Lock(run.config.experiment_dir).is_held():  # by a training that outlived its runner
            time.sleep(0.2)
        for command in run.commands(self.take_over):
            status = self.execute(command, log)
            if self.told:
                return
            if status:
                break
        said = f"finished {name}"
        if status or run.scored() is None:
            said = f"{name}: ended with status {status}, see {log}"
            self.faults.append(said)
        else:
            run.tidy()
        print(said, flush=True)

    def execute(self, command: Sequence[str], log: Path) -> int:
        """The exit status of one of our commands; it is not started once we are told to stop."""
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs))} | os.environ
        # in a session of its own: Ctrl-C reaches us alone, and we pass it on once
        options = {"env": environment, "cwd": REPOSITORY, "stdin": subprocess.DEVNULL, "start_new_session": True}
        with open(log, "ab") as output, self.turn:
            if self.told:
                return 0
            output.write(f"\n$ {shlex.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, **options)
            self.active.add(process)
        status = process.wait()
        with self.turn:
            self.active.remove(process)
        return status


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
