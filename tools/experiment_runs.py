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

EXPECTED = {
    "name": "at most 41 letters, digits, '.', '_' and '-'",
    "cfg": "the path of a config",
    "overrides": "an object of config keys other than exp_name and seed",
    "seeds": "a list of different whole numbers, such as [0, 1, 2]",
    "search": 'values to try, such as {"lr": [0.001, 0.002]}, or the name of another run',
}
HELD_OUT = 6  # one train photo in so many


@dataclass(frozen=True)
class Run:
    """One training, whose last weights are scored: the best ones are chosen on the photos that are scored."""

    entry: str
    config: Config
    arguments: list[str]  # of train.py and evaluate.py
    is_try: bool

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
        return experiment if is_final and all(then[key] == now[key] for key in ("decode", "root_bias")) else None

    def tidy(self) -> None:
        """Of a scored run the last checkpoint stays, of a try none: those of a hundred runs would fill a disk."""
        for path in self.config.checkpoints_dir.glob("*.pt"):
            if self.is_try or path.name != "last.pt":
                path.unlink()


@dataclass(frozen=True)
class Entry:
    """One item of "runs"; `search` holds the values to try, or names the entry whose choice is taken."""

    file: Path
    name: str
    cfg: str
    seeds: list[int]
    overrides: dict[str, Any]
    search: dict[str, list] | str | None

    def run(self, label: str, keys: dict[str, Any], is_try: bool = False) -> Run:
        own = self.overrides | keys | {"exp_name": f"{self.file.stem}_{self.name}_{label}"}
        texts = [f"{key}={value if TYPES.get(key) is str else json.dumps(value)}" for key, value in own.items()]
        try:
            config = load_config(REPOSITORY / self.cfg, texts)
        except UserError as error:
            raise UserError(f"{self.file}, run {self.name!r}: {error}") from None
        return Run(self.name, config, ["--cfg", self.cfg, *texts], is_try)

    def finals(self, keys: dict[str, Any]) -> list[Run]:
        """One run a seed, on all train photos."""
        return [self.run(f"seed{seed}", keys | {"seed": seed}) for seed in self.seeds]

    @property
    def logs(self) -> Path:
        return self.run("logs", {}).config.root / "experiments" / "logs" / self.file.stem

    def tries(self) -> list[Run]:
        """One run a combination of the values to try, with the first seed, scored on the held-out photos."""
        if not isinstance(self.search, dict):
            return []
        lists = {f"{split}_sample_ids_file": str(self.logs / f"{self.name}_{split}.txt") for split in ("train", "val")}
        fixed = lists | {"seed": self.seeds[0], "root_bias": {}}  # a bias is of one rule, which is yet to be chosen
        tries = [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]
        return [
            self.run("_".join(["try", *(f"{k}{v}" for k, v in keys.items())]), keys | fixed, True) for keys in tries
        ]

    def choice(self) -> dict[str, Any] | None:
        """The try and the decoding rule with the best of the config's monitored score; None until all are scored."""
        found: list[tuple[float, dict[str, Any]]] = [] if isinstance(self.search, dict) else [(0.0, {})]
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
    _check_keys(content, {*EXPECTED, "runs"} - {"name"}, {"runs"}, str(file))
    shared = {"overrides": {}, "search": None} | {key: value for key, value in content.items() if key != "runs"}
    if not isinstance(content["runs"], list) or not content["runs"]:
        raise UserError(f"{file}: 'runs' must be a list with at least one run")
    entries = [_read_entry(file, shared, record, f"{file}: runs[{i}]") for i, record in enumerate(content["runs"])]
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise UserError(f"{file}, run {entry.name!r}: two runs have this name; give each its own")
        if isinstance(entry.search, str) and not any(e.name == entry.search and e.tries() for e in entries):
            raise UserError(f"{file}, run {entry.name!r}: 'search' is {entry.search!r}, no run that searches by itself")
        _ = entry.tries(), entry.finals({})  # their configs are checked
    return entries


def _read_entry(file: Path, shared: dict[str, Any], record: Any, where: str) -> Entry:
    _check_keys(record, set(EXPECTED), {"name", "cfg", "seeds"} - shared.keys(), where)
    values = shared | record
    name, seeds, search = (values[key] for key in ("name", "seeds", "search"))
    to_try = list(search.values()) if isinstance(search, dict) else []
    is_right = {
        "name": isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", name),
        "cfg": isinstance(values["cfg"], str),
        "overrides": all(isinstance(part.get("overrides", {}), dict) for part in (shared, record)),
        "seeds": isinstance(seeds, list) and seeds and all(type(s) is int and seeds.count(s) == 1 for s in seeds),
        "search": isinstance(search, dict | str | None) and all(isinstance(v, list) and v for v in to_try),
    }
    if is_right["overrides"]:
        values["overrides"] = shared["overrides"] | record.get("overrides", {})
        is_right["overrides"] = not {"exp_name", "seed"} & values["overrides"].keys()
    if wrong := [key for key in is_right if not is_right[key]]:
        raise UserError(f"{where}: {wrong[0]!r} is {values[wrong[0]]!r}; expected {EXPECTED[wrong[0]]}")
    return Entry(file, **values)


def _check_keys(record: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with the keys {', '.join(sorted(known))}")
    if wrong := sorted(set(record) - known) + sorted(required - set(record)):
        state = "unknown key" if wrong[0] in record else "is missing the key"
        raise UserError(f"{where}: {state} {wrong[0]!r}; known keys are {', '.join(sorted(known))}")
