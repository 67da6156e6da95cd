"""How cost grows: photos/s against crop size, batch size, number of nodes, loader workers and processes.

python tools/benchmark.py --scaling
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401 - before torch

# isort: split
import torch

from configs.config import REPOSITORY, save_config
from manage.data import train_loader
from manage.experiment import cores
from tools.benchmark import cost_of, take_turns
from tools.benchmark_stages import Setting, config_for, forward_backward, random_batch, training
from utils.cli import progress
from utils.decode import DECODERS
from utils.errors import UserError
from utils.hierarchy import Hierarchy
from utils.losses import LOSSES

NODES = (10, 27, 200)


def scaling_tables(setting: Setting) -> dict:
    """Measures and prints all tables; returns them as plain JSON types."""
    crops, batches = ((64, 96), (1, 2)) if setting.quick else ((128, 256, 480), (1, 4, 16))
    workers, processes = ((0, 1), (1, 2)) if setting.quick else ((0, 1, 2), (1, 2))
    middle = crops[len(crops) // 2]
    jobs = [
        ("crop", lambda: [row(f"{crop}", step_rate(setting, crop, batches[1])) for crop in crops]),
        ("batch", lambda: [row(f"{batch}", step_rate(setting, middle, batch)) for batch in batches]),
        ("nodes", lambda: node_rows(setting)),
        ("workers", lambda: [row(f"{n}", loader_rate(setting, n)) for n in workers]),
        ("processes", lambda: [row(f"{n}", process_rate(setting, middle, n)) for n in processes]),
    ]
    titles = {
        "crop": f"Training steps, batch {batches[1]}, by side of the crop",
        "batch": f"Training steps, crop {middle}, by batch size",
        "nodes": f"Loss and scores, crop {setting.crops[-1]}, batch {setting.batch}, by nodes of the tree",
        "workers": f"Loader, crop {setting.crops[-1]}, by workers (0: in the main process)",
        "processes": f"Training epochs, crop {middle}, by processes that share {cores()} cores",
    }
    tables = {}
    for name, measure in (bar := progress(jobs, desc="tables")):
        bar.set_postfix_str(name)
        tables[name] = {"title": titles[name], "rows": measure()}
    for name, table in tables.items():
        print(f"\n{table['title']}\n\n{as_markdown(name, table['rows'])}")
    return {"scaling": tables}


def row(what: str, rates: Sequence[float]) -> dict:
    return {
        "value": what,
        "photos_per_second": {"median": statistics.median(rates), "low": min(rates), "high": max(rates)},
    }


def as_markdown(name: str, rows: list[dict]) -> str:
    columns = [key for key in rows[0] if key != "value"]
    lines = [f"| {name} | {' | '.join(column.replace('_per_', ' per ').replace('_', ' ') for column in columns)} |"]
    lines.append("|" + "---|" * (1 + len(columns)))
    for entry in rows:
        cells = [
            f"{entry[column]['median']:.3g} ({entry[column]['low']:.3g} to {entry[column]['high']:.3g})"
            for column in columns
        ]
        lines.append(f"| {entry['value']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def repeats(setting: Setting) -> int:
    return 2 if setting.quick else 5


def step_rate(setting: Setting, crop: int, batch: int) -> list[float]:
    """Photos/s of training steps on a batch in memory."""
    manager, group = training(setting, crop, batch_size=batch)
    manager.train_step(group)
    rates = [batch / cost_of(lambda: manager.train_step(group) is None or None) for _ in range(repeats(setting))]
    manager._close()
    return rates


def node_rows(setting: Setting) -> list[dict]:
    """Photos/s of each loss, forward and backward, and of decoding."""
    rows = []
    for nodes in NODES:
        h = tree_of(nodes)
        logits, labels = random_batch(setting, h)
        runners = {
            "bce": forward_backward(lambda z, h=h, labels=labels: LOSSES["bce"](z, labels, h), logits),
            "tree_min": forward_backward(lambda z, h=h, labels=labels: LOSSES["tree_min"](z, labels, h), logits),
            "decode": lambda h=h, logits=logits: DECODERS["logit_sum"](logits, h) is None or None,
        }
        costs = take_turns(runners, repeats(setting))
        entry = {"value": f"{nodes}"}
        for name, seconds in costs.items():
            rates = [setting.batch / second for second in seconds]
            key = f"{name}_photos_per_second"
            entry[key] = {"median": statistics.median(rates), "low": min(rates), "high": max(rates)}
        rows.append(entry)
    return rows


def tree_of(nodes: int) -> Hierarchy:
    """A tree of so many nodes, filled level by level: a background and roots of three children each."""
    roots = 1 + max(1, nodes // 13)  # with their 3 children and 9 grandchildren, 13 nodes
    parents: list[int | None] = [None] * roots
    while len(parents) < nodes:
        parents.append(1 + (len(parents) - roots) // 3)
    children = {parent for parent in parents if parent is not None}
    leaves = [v for v in range(nodes) if v not in children]
    inner = [v for v in range(nodes) if v in children]
    order = {old: new for new, old in enumerate(leaves + inner)}  # leaves first, as in the data set
    ordered = [None if parents[v] is None else order[parents[v]] for v in leaves + inner]
    colours = [(v % 251, v // 251, 7) for v in range(nodes)]
    depth = max(len(path_to_root(v, ordered)) for v in range(nodes))
    names = [f"node {v}" for v in range(nodes)]
    return Hierarchy("benchmark", names, ordered, colours, [f"level {k}" for k in range(depth)], background=[0])


def path_to_root(node: int, parents: Sequence[int | None]) -> list[int]:
    path = [node]
    while parents[path[-1]] is not None:
        path.append(parents[path[-1]])
    return path


def loader_rate(setting: Setting, workers: int) -> list[float]:
    """Photos/s of an epoch of the loader, nobody else at work; the first epoch starts the workers."""
    config = config_for(setting, "loader", crop_size=setting.crops[-1], num_workers=workers, batch_size=2)
    loader, batches = train_loader(config, setting.hierarchy, 0, 1)
    rates = []
    for epoch in range(1 + repeats(setting)):
        batches.start_at(epoch)
        seconds = cost_of(lambda: [None for _ in loader] and None)
        rates.append(batches.n_batches * config.batch_size / seconds)
    return rates[1:]


def process_rate(setting: Setting, crop: int, processes: int) -> list[float]:
    """Photos/s of training epochs under torchrun, as train.py writes them down; the first epoch warms up."""
    name = f"processes{processes}"
    config = config_for(
        setting, name, crop_size=crop, batch_size=2, n_epochs=1 + repeats(setting), n_val_photos=2, num_workers=1
    )
    cfg = setting.folder / f"{name}.json"
    save_config(config, cfg)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = str(max(1, torch.get_num_threads() // processes))
    command = [*launcher, str(REPOSITORY / "train.py"), "--cfg", str(cfg)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    if done.returncode:
        raise UserError(f"train.py with {processes} processes failed:\n{done.stderr[-2000:]}")
    lines = (config.experiment_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["photos_per_second"] for line in lines][1:]
