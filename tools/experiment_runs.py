"""What a file of runs says (tools/experiment.py shows one), and what is chosen for each on photos held out of train."""

import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.config import REPOSITORY, RESUMABLE_CHANGES, TYPES, Config, load_config
from manage.comparison import Experiment, load_experiment
from utils.errors import UserError
from utils.files import read_json, write_whole
from utils.ids import read_ids

EXPECTED = {
    "name": "at most 41 letters, digits, '.', '_' and '-'",
    "cfg": "the path of a config",
    "overrides": "an object of config keys other than exp_name and seed",
    "seeds": "a list of different whole numbers, such as [0, 1, 2]",
    "search": 'values to try, such as {"lr": [0.001, 0.002]}, or the name of another run',
}
HELD_OUT = 6  # one train photo in so many
LISTS = {"train_sample_ids_file": "_without_a_sixth", "val_sample_ids_file": "_a_sixth"}


@dataclass(frozen=True)
class Run:
    """One training, whose last weights are scored: the best ones are chosen on the photos that are scored."""

    entry: str
    name: str
    overrides: dict[str, Any]
    arguments: list[str]  # of train.py and evaluate.py
    config: Config

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
                f"experiment {self.name!r} exists with another config ({', '.join(changed)} differ) in "
                f"{self.config.experiment_dir}; rename the run, or move that folder away"
            )
        is_final = experiment.record["epoch"] == self.config.n_epochs
        return experiment if is_final and all(then[key] == now[key] for key in ("decode", "root_bias")) else None


@dataclass(frozen=True)
class Entry:
    """One item of "runs"; `search` holds the values to try, or names the entry whose choice is taken."""

    name: str
    cfg: str
    overrides: dict[str, Any]
    seeds: list[int]
    search: dict[str, list] | str | None
    file: Path

    def run(self, label: str, keys: dict[str, Any]) -> Run:
        own = self.overrides | keys | {"exp_name": f"{self.file.stem}_{self.name}_{label}"}
        texts = [f"{key}={value if TYPES.get(key) is str else json.dumps(value)}" for key, value in own.items()]
        try:
            config = load_config(REPOSITORY / self.cfg, texts)
        except UserError as error:
            raise UserError(f"{self.file}, run {self.name!r}: {error}") from None
        return Run(self.name, config.exp_name, own, ["--cfg", self.cfg, *texts], config)

    def finals(self, keys: dict[str, Any]) -> list[Run]:
        """One run a seed, on all train photos."""
        return [self.run(f"seed{seed}", keys | {"seed": seed}) for seed in self.seeds]

    def tries(self) -> list[Run]:
        """One run a combination of the values to try, with the first seed, scored on the held-out photos."""
        if not isinstance(self.search, dict):
            return []
        ids_file = Path(self.finals({})[0].config.train_sample_ids_file)
        fixed = {key: str(ids_file.with_stem(ids_file.stem + ending)) for key, ending in LISTS.items()}
        fixed |= {"seed": self.seeds[0], "root_bias": {}}  # a bias is of one rule, and the rule is yet to be chosen
        tries = [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]
        return [self.run("_".join(["try", *(f"{k}{v}" for k, v in keys.items())]), keys | fixed) for keys in tries]

    def choice(self) -> dict[str, Any] | None:
        """The try and the decoding rule with the best of the config's monitored score; None until all are scored."""
        found: list[tuple[float, dict[str, Any]]] = [] if isinstance(self.search, dict) else [(0.0, {})]
        for run in self.tries():
            if (experiment := run.scored()) is None:
                return None
            way, score = run.config.monitor.split()
            keys = {key: run.overrides[key] for key in self.search} | {"root_bias": {}}
            for rule, scores in experiment.record["rules"].items():
                if (value := scores.get(score)) is not None:
                    found.append((value if way == "max" else -value, keys | {"decode": rule}))
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def write_lists(self) -> None:
        """Splits the train ids by chance, always the same. Raises: UserError when such a list holds other ids."""
        for run in self.tries()[:1]:
            ids = read_ids(self.finals({})[0].config.ids_file("train"))
            held_out = set(random.Random(0).sample(sorted(ids), max(1, len(ids) // HELD_OUT)))
            for split in ("train", "val"):
                path = run.config.ids_file(split)
                text = "".join(f"{i}\n" for i in ids if (i in held_out) == (split == "val"))
                if not path.exists():
                    write_whole(text, path)
                elif path.read_text(encoding="utf-8") != text:
                    raise UserError(f"{path}: lists other photos than a split of the train list does; move it away")


def read_entries(file: Path) -> list[Entry]:
    """All runs of the file, checked down to the last config key of every one.

    Raises: UserError naming the file, the run and the key.
    """
    content = read_json(file)
    _check_keys(content, {"runs", "search"}, {"runs"}, str(file))
    if not isinstance(content["runs"], list) or not content["runs"]:
        raise UserError(f"{file}: 'runs' must be a list with at least one run")
    entries = [_read_entry(file, record, content.get("search"), i) for i, record in enumerate(content["runs"])]
    names = [entry.name for entry in entries]
    for entry in entries:
        if names.count(entry.name) > 1:
            raise UserError(f"{file}, run {entry.name!r}: two runs have this name; give each its own")
        if isinstance(entry.search, str) and not any(e.name == entry.search and e.tries() for e in entries):
            raise UserError(f"{file}, run {entry.name!r}: 'search' is {entry.search!r}, no run that searches by itself")
        _ = entry.tries(), entry.finals({})  # their configs are checked
    return entries


def _read_entry(file: Path, record: Any, search: Any, number: int) -> Entry:
    where = f"{file}: runs[{number}]"
    _check_keys(record, set(EXPECTED), {"name", "cfg", "seeds"}, where)
    values = {"overrides": {}, "search": search} | record
    name, seeds, overrides, search = (values[key] for key in ("name", "seeds", "overrides", "search"))
    to_try = list(search.values()) if isinstance(search, dict) else []
    is_right = {
        "name": isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", name),
        "cfg": isinstance(values["cfg"], str),
        "overrides": isinstance(overrides, dict) and not {"exp_name", "seed"} & set(overrides),
        "seeds": isinstance(seeds, list) and seeds and all(type(s) is int and seeds.count(s) == 1 for s in seeds),
        "search": isinstance(search, dict | str | None) and all(isinstance(v, list) and v for v in to_try),
    }
    if wrong := [key for key in is_right if not is_right[key]]:
        raise UserError(f"{where}: {wrong[0]!r} is {values[wrong[0]]!r}; expected {EXPECTED[wrong[0]]}")
    return Entry(**values, file=file)


def _check_keys(record: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with the keys {', '.join(sorted(known))}")
    if wrong := sorted(set(record) - known) + sorted(required - set(record)):
        state = "unknown key" if wrong[0] in record else "is missing the key"
        raise UserError(f"{where}: {state} {wrong[0]!r}; known keys are {', '.join(sorted(known))}")
