"""The package for pip. `scripts/test.sh` makes its environment by scripts/create_hseg_env.sh each time."""

import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.factory import REPO

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
