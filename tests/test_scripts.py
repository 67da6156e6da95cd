"""The environment's script, where the programs it calls are stubs that install nothing, and the package for pip."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.factory import REPO

CONDA = """#!/usr/bin/env bash
echo "conda $*" >> "$CALLS"
while [ "$1" != --prefix ]; do shift; done
mkdir -p "$2/bin"
echo 'echo "python $*" >> "$CALLS"' > "$2/bin/python"
chmod +x "$2/bin/python"
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script in a copy of the repository, with a stub of conda; returns what it called."""
    repository, conda, calls = tmp_path / "a repository", tmp_path / "bin/conda", tmp_path / "calls"
    for path in (repository / "scripts", conda.parent):
        path.mkdir(parents=True)
    shutil.copy(REPO / "scripts" / "create_hseg_env.sh", repository / "scripts")
    for path in REPO.glob("requirements*.txt"):
        shutil.copy(path, repository)
    conda.write_text(CONDA)
    conda.chmod(0o755)

    def call(*arguments: str) -> tuple[str, str]:
        calls.write_text("")
        variables = {"CALLS": str(calls), "PATH": f"{conda.parent}:{os.environ['PATH']}", "HSEG_NO_CONDA": "0"}
        command = ["bash", repository / "scripts" / "create_hseg_env.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{repository}/hseg_env/bin/python\n"), done.stderr
        return calls.read_text()

    return call


def test_the_environment_lies_in_the_repository_and_a_second_call_installs_what_changed(run, tmp_path):
    calls = run()
    assert f"conda create --yes --quiet --prefix {tmp_path}/a repository/hseg_env python=3.12 pip\n" in calls
    assert "-r requirements.txt" in calls
    assert "install" not in run()
    first, second = (line for line in run("--dev", "--cpu").splitlines() if "pip install" in line)
    assert "--index-url https://download.pytorch.org/whl/cpu torch>=" in first  # before what else would bring it
    assert " torchvision>=" in first
    assert second.endswith("-r requirements-dev.txt")


USE = """
from configs.config import Config
from manage.predictor import Predictor
from manage.report import ASSETS
from utils.hierarchy import Hierarchy
from utils.losses import LOSSES
print(Hierarchy.load(Config().hierarchy_file).num_nodes, len(LOSSES), sorted(path.name for path in ASSETS.iterdir()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("editable", [True, False])
def test_after_pip_install_everything_is_importable_from_elsewhere(tmp_path, editable):
    pytest.importorskip("setuptools")
    source, env = tmp_path / "source", tmp_path / "env"
    for name in ("configs", "manage", "models", "utils"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(REPO / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (packages,) = env.glob("lib/python3*/site-packages")
    (packages / "host.pth").write_text(sysconfig.get_paths()["purelib"])  # torch and setuptools are this Python's
    install = [sys.executable, "-m", "pip", "--python", env / "bin/python", "install", "--no-deps", "--no-index"]
    what = ["--no-build-isolation", *["-e"] * editable, source]
    subprocess.run([*install, *what], capture_output=True, check=True)
    if not editable:
        shutil.rmtree(source)
    done = subprocess.run([env / "bin/python", "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assets = sorted(path.name for path in (REPO / "manage" / "report_assets").iterdir())
    assert done.stdout == f"10 11 {assets}\n", done.stderr
