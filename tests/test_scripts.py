"""The script that makes the environment, where there is conda; the programs it calls are stubs that install nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

CONDA = """#!/usr/bin/env bash
# Keeps named environments elsewhere, as with envs_dirs or a base that cannot be written.
echo "conda $*" >> "$CALLS"
if [ "$1 $2" = "info --base" ]; then echo "$BASE"; exit; fi
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) env=$2 ;;
        --name) env=$ELSEWHERE/$2 ;;
    esac
    shift
done
mkdir -p "$env/bin"
cp "$PYTHON_STUB" "$env/bin/python"
"""
PYTHON = """#!/usr/bin/env bash
echo "python $*" >> "$CALLS"
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def run(tmp_path):
    """Runs the script in a copy of the repository, with conda; returns its output, its errors and what it called."""
    repository = tmp_path / "a repository"
    (repository / "scripts").mkdir(parents=True)
    shutil.copy(REPO / "scripts" / "create_hseg_env.sh", repository / "scripts")
    for path in REPO.glob("requirements*.txt"):
        shutil.copy(path, repository)
    write_program(tmp_path / "bin" / "conda", CONDA)
    calls = tmp_path / "calls"
    places = {"CALLS": calls, "BASE": tmp_path / "base", "ELSEWHERE": tmp_path / "elsewhere"}
    places["PYTHON_STUB"] = write_program(tmp_path / "python_stub", PYTHON)
    variables = {name: str(place) for name, place in places.items()}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def call(*arguments: str) -> tuple[str, str, str]:
        calls.write_text("")
        command = ["bash", repository / "scripts" / "create_hseg_env.sh", *arguments]
        environment = os.environ | variables | {"PATH": path, "HSEG_NO_CONDA": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr, calls.read_text()

    return call


@pytest.mark.parametrize("in_base", [False, True])
def test_with_conda_too_the_environment_lies_in_the_repository(run, tmp_path, in_base):
    if in_base:  # one of that name that is not this project's
        write_program(tmp_path / "base" / "envs" / "hseg_env" / "bin" / "python", PYTHON)
    env = tmp_path / "a repository" / "hseg_env"
    output, _, calls = run()
    assert output == f"{env}/bin/python\n"
    assert f"conda create --yes --quiet --prefix {env} python=3.12 pip\n" in calls
    assert "pip install" in calls
    assert "-r requirements.txt" in calls


def test_a_second_call_installs_only_what_has_changed(run):
    run()
    output, errors, calls = run()
    assert output.endswith("hseg_env/bin/python\n")
    assert errors == ""
    assert "conda" not in calls
    assert "pip install" not in calls
    assert "-r requirements-dev.txt" in run("--dev")[2]


def test_help_is_the_head_of_the_script(run):
    output, _, calls = run("--help")
    assert output.startswith("Makes the Python environment hseg_env in the repository")
    assert output.endswith('export PATH="$PWD/hseg_env/bin:$PATH"\n')
    assert calls == ""
