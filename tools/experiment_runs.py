"""What a file of runs says (tools/experiment.py shows one), and what is chosen for each on photos held out of train."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.config import REPOSITORY, RESUMABLE_CHANGES, TYPES, Config, load_config
from manage.comparison import Experiment, load_experiment
from utils.errors import UserError
from utils.files import read_json
from utils.ids import draw_split, read_ids, write_ids

KEYS = {"name": str, "cfg": str, "overrides": dict, "seeds": list, "search": dict | None}
HELD_OUT = 6  # one train photo in so many


@dataclass(frozen=True)
class Run:
    """One training, whose last weights are scored: the best ones are chosen on the photos that are scored."""

    entry: str
    config: Config
    arguments: list[str]  # of train.py

    def scored(self) -> Experiment | None:
        """None until it is trained to the end, and scored as its config decodes.

        Raises: UserError when an experiment of that name was trained with another config.
        """
        try:
            experiment = load_experiment(self.config.experiment_dir, "last")
        except UserError:
            return None
        then, now = experiment.config, self.config.to_dict() | {"decode": self.config.decode_rule}
        if changed := [key for key in now.keys() & then.keys() - RESUMABLE_CHANGES if now[key] != then[key]]:
            raise UserError(
                f"experiment {self.config.exp_name!r} exists with another config ({', '.join(changed)} differ) in "
                f"{self.config.experiment_dir}; rename the run, or move that folder away"
            )
        is_final = experiment.record["epoch"] == self.config.n_epochs
        return experiment if is_final and all(then[key] == now[key] for key in ("decode", "root_bias", "tta")) else None

    def commands(self, take_over: bool) -> list[list[str]]:
        """Its training, then its evaluation: by the run's own copy of the config.

        A rule or bias that is named here would be another one than the checkpoint's own.
        """
        resuming = ["--resume", "auto", *(["--take-over"] if take_over else [])]
        scoring = ["--cfg", str(self.config.copy_file), "--checkpoint", "last", "--decode", "all", "--no-pictures"]
        return [["train.py", *self.arguments, *resuming], ["evaluate.py", *scoring, "n_val_photos=null"]]

    def tidy(self) -> None:
        """Of a scored run the last checkpoint stays: all those of a hundred runs would fill a disk."""
        for path in self.config.checkpoints_dir.glob("*.pt"):
            if path.name != "last.pt":
                path.unlink()


@dataclass(frozen=True)
class Entry:
    """One item of "runs"; `search` holds the values to try."""

    file: Path
    name: str
    cfg: str
    seeds: list[int]
    overrides: dict[str, Any]
    search: dict[str, list] | None

    def run(self, label: str, keys: dict[str, Any]) -> Run:
        label = re.sub(r"[^\w.-]+", "-", label, flags=re.ASCII)  # which may hold any values
        own = self.overrides | keys | {"exp_name": f"{self.file.stem}_{self.name}_{label}"}
        texts = [f"{key}={value if TYPES.get(key) is str else json.dumps(value)}" for key, value in own.items()]
        try:
            config = load_config(REPOSITORY / self.cfg, texts)
        except UserError as error:
            raise UserError(f"{self.file}, run {self.name!r}: {error}") from None
        return Run(self.name, config, ["--cfg", self.cfg, *texts])

    def finals(self, keys: dict[str, Any]) -> list[Run]:
        """One run a seed, on all train photos."""
        return [self.run(f"seed{seed}", keys | {"seed": seed}) for seed in self.seeds]

    @property
    def logs(self) -> Path:
        return self.run("logs", {}).config.root / "experiments" / "logs" / self.file.stem

    def tries(self) -> list[Run]:
        """One run a combination of the values to try, with the first seed, scored on the held-out photos."""
        if self.search is None:
            return []
        lists = {f"{split}_sample_ids_file": str(self.logs / f"{self.name}_{split}.txt") for split in ("train", "val")}
        fixed = lists | {"seed": self.seeds[0], "root_bias": {}}  # a bias is of one rule, which is yet to be chosen
        tries = [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]
        return [self.run("_".join(["try", *(f"{k}{v}" for k, v in keys.items())]), keys | fixed) for keys in tries]

    def choice(self) -> dict[str, Any] | None:
        """The try and the decoding rule with the best of the config's monitored score; None until all are scored."""
        found: list[tuple[float, dict[str, Any]]] = [] if self.search else [(0.0, {})]
        for run in self.tries():
            if (experiment := run.scored()) is None:
                return None
            way, score = run.config.monitor.split()
            keys = {key: getattr(run.config, key) for key in self.search} | {"root_bias": {}}
            for rule, scores in experiment.record["rules"].items():
                if (value := scores.get(score)) is not None:
                    found.append((value if way == "max" else -value, keys | {"decode": rule}))
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def write_lists(self) -> None:
        """Splits the train ids by chance, always the same. Raises: OSError."""
        for run in self.tries()[:1]:
            parts = draw_split(read_ids(self.finals({})[0].config.ids_file("train")), 1 / HELD_OUT, seed=0)
            for split, ids in parts.items():
                write_ids(ids, run.config.ids_file(split))


def read_entries(file: Path) -> list[Entry]:
    """All runs of the file, checked down to the last config key of every one.

    Raises: UserError naming the file, the run and the key.
    """
    content = read_json(file)
    runs = content.pop("runs", None) if isinstance(content, dict) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{file}: expected a JSON object with a list of at least one run as 'runs', each an object")
    entries = [Entry(file, **_with_shared(content, run, f"{file}: runs[{i}]")) for i, run in enumerate(runs)]
    names = [run.config.exp_name for entry in entries for run in (*entry.tries(), *entry.finals({}))]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{file}: two runs would be {twice[0]!r}; give each a name, and each seed once")
    return entries


def _with_shared(shared: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of a run, and those beside "runs"."""
    values = {"search": None} | shared | own
    wrong = [key for part in (shared, own) for key in part if not isinstance(part[key], KEYS.get(key, ()))]
    if not wrong:
        values["overrides"] = shared.get("overrides", {}) | own.get("overrides", {})
        tried, barred = values["search"] or {}, {"exp_name", "seed"}
        wrong = [key for key in KEYS if key not in values or values[key] == []]
        wrong += ["overrides"] * bool(barred & values["overrides"].keys())
        wrong += ["search"] * (bool(barred & {*tried}) or not all(isinstance(v, list) and v for v in tried.values()))
    if wrong:
        found = json.dumps(values[wrong[0]]) if wrong[0] in values else "missing"
        shown = f"known keys are {', '.join(KEYS)}; python tools/experiment.py --help shows an example"
        raise UserError(f"{where}: {wrong[0]!r} is {found}; {shown}")
    return values
