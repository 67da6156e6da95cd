"""Every command of README.md and docs/: run on small data in a copy of the repository, or marked as needing more.

A line `<!-- needs: real data -->` (or gpu, internet, hours ...) before a block of commands leaves it out. Before a
block of text, "Save as `path`" writes it there. The commands of a page run in its order, as a reader would do it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SAMPLE
from tests.factory import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
# (path to save it at, what it needs, kind, text) of a block of code; the first two may be empty
BLOCK = re.compile(r"(?:Save as `([^`\n]+)`[^\n]*\n\n)?(?:<!-- needs: ([^>]*?) -->\n)?```(\w*)\n(.*?)```", re.S)
TOLD = re.compile(r"\bpython ((?:tools/|configs/)?\w+\.py [^`'\"\n;()]*)")
SMALL = {"n_epochs": 1, "crop_size": 32, "decoder_channels": [8] * 5, "batch_size": 2, "num_workers": 0}
SMALL |= {"encoder": "mobilenet_v3_small", "pretrained": False, "warmup_epochs": 0, "save_epoch": 1}
FEWER = {"n_epochs=20": "n_epochs=4", "n_epochs=30": "n_epochs=5"}
COPIED = (".py", ".json", ".html", ".css", ".js", ".txt", ".md", ".sh", ".pt")
ELSEWHERE = {"pip", "tensorboard", "export", "cd", "source", "git"}  # programs that are not ours

# Holds torch and our modules, and forks for each command: a start costs a tenth of a second, not five.
SERVER = """
import os, runpy, sys, traceback
sys.path.insert(0, os.getcwd())
import torch, torchvision, train, evaluate, tools.predict
torch.set_num_threads(1)
while words := open("ask").read().split(chr(0))[:-1]:
    if (child := os.fork()) == 0:
        sys.argv = words
        out = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, file=open("answer", "w"))
"""
PYTHON = """#!/usr/bin/env bash
cd {folder}
[ "$1" != -m ] || exec {python} "$@"
printf '%s\\0' "$@" >ask
read -r status <answer
cat output
exit "$status"
"""


def commands(text: str) -> list[list[str]]:
    """The commands of a block, as words; comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if shlex.split(part, True)]


class House:
    """A copy of the repository that one may write in, with small data in the places of the large."""

    def __init__(self, folder: Path, sample: Path) -> None:
        self.folder = folder
        for name in subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split("\n"):
            if name.endswith(COPIED) and (REPO / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, folder / name)
        for name in ("sample", "pascal_part"):
            shutil.copytree(sample, folder / "data" / name)
        for path in (folder / "configs").glob("*.json"):
            values = json.loads(path.read_text()) | SMALL
            for key in ("encoder_weights", "init_from", "short_side", "ema_decay", "accumulate"):
                values.pop(key, None)
            path.write_text(json.dumps(values))
        draw = folder / "tools" / "make_sample_data.py"  # so that it finds what lies there drawn already
        own = r"(train|val|size): int = \d+", lambda words: f"{words[1]}: int = {getattr(SAMPLE, words[1])}"
        draw.write_text(re.sub(*own, draw.read_text()))
        (folder / "bin").mkdir()
        (folder / "bin" / "python").write_text(PYTHON.format(folder=folder, python=sys.executable))
        (folder / "bin" / "python").chmod(0o755)
        os.mkfifo(folder / "ask"), os.mkfifo(folder / "answer")
        (folder / "scripts" / "create_hseg_env.sh").write_text(f"echo {folder}/bin/python\n")  # has tests of its own
        (folder / "scripts" / "test.sh").write_text("exit 0\n")
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=folder)

    def run(self, words: list[str]) -> str:
        """Runs one command; returns what it said. Fails where its status is not 0."""
        places = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = os.environ | {"PATH": ":".join(places)}
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, env=environment)
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{shlex.join(words)}\n{output[-3000:]}"
        return output

    def follow(self, page: Path) -> None:
        """Does what a page says, and once what its commands say to do next."""
        told = {}
        for path, needs, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if path:
                (self.folder / path).write_text(text)
            for words in commands(text) if kind == "bash" and not needs else ():
                if words[0] in ELSEWHERE:
                    continue
                output = self.run([FEWER.get(word, word) for word in words])
                told |= dict.fromkeys(TOLD.findall(output) if "--help" not in words else [])
        for line in told:
            if not re.search(r"[<…]|\.\.\.|\b[A-Z]\b", line):  # a place for a name
                self.run(["python", *shlex.split(line.rstrip(" .,:"))])


@pytest.fixture(scope="module")
def server(tmp_path_factory, sample_data):
    made = House(tmp_path_factory.mktemp("commands") / "house", sample_data)
    yield made
    made.server.kill()


@pytest.fixture
def house(server):
    """Where no command has been run yet."""
    for name in ("experiments", "tensorboard", "outputs"):
        shutil.rmtree(server.folder / name, ignore_errors=True)
    return server


def draw_animals(folder: Path) -> None:
    """Twelve photos, and masks with a value for each part, in blocks."""
    generator = np.random.default_rng(0)
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "gt_masks").mkdir()
    for i in range(12):
        mask = generator.choice([0, 1, 2, 3, 4, 5, 255], (6, 8)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        photo = 40 * np.stack([mask % 7] * 3, axis=2) + generator.integers(0, 10, (96, 128, 3))
        Image.fromarray(photo.astype(np.uint8)).save(folder / "JPEGImages" / f"animal_{i:02}.jpg")
        Image.fromarray(mask).save(folder / "gt_masks" / f"animal_{i:02}.png")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(house, page):
    if page.stem == "own_data":
        draw_animals(house.folder / "data" / "animals")
    if page.stem in ("evaluate", "predict"):
        house.run(["python", "train.py", "--cfg", "configs/quickstart.json"])
    house.follow(page)
    assert page.stem != "own_data" or len(list((house.folder / "outputs/animals/overlay").glob("*.jpg"))) == 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for script, options in re.findall(r"python ((?:\w+/)*\w+\.py)([^`\n#|]*)", text):
        assert (REPO / script).is_file(), f"{page.name} names {script}"
        source = (REPO / script).read_text(encoding="utf-8")
        for option in re.findall(r" (--[a-z][\w-]*)", options):
            assert f'"{option}"' in source or option == "--help", f"{page.name}: {script} knows no {option}"
