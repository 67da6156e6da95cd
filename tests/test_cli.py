"""What the entry points share."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factory import REPO
from utils.cli import progress, run_main
from utils.errors import UserError

ENTRIES = [REPO / "train.py", REPO / "evaluate.py", *sorted((REPO / "tools").glob("[a-z]*.py"))]
ENTRIES = [path for path in ENTRIES if '__name__ == "__main__"' in path.read_text()]


def fail(_item: object = None) -> None:
    raise UserError("key 'lr': too large")


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run_main(fail)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: key 'lr': too large\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("another fault")])
def test_memory_that_runs_out_is_one_line_too(error: Exception, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError if "another" in str(error) else SystemExit):
        run_main(lambda: (_ for _ in ()).throw(error))
    assert capsys.readouterr().err.startswith("error: out of memory; ") == ("another" not in str(error))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_gets_a_bar_and_a_log_file_no_fragments_of_one(is_terminal: bool, monkeypatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    assert list(progress(range(3), desc="epoch", disable=False)) == [0, 1, 2]
    assert bool(stream.getvalue()) == is_terminal


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_threads_are_told_to_sleep_before_torch_is_loaded(path: Path) -> None:
    """By `utils`, which `configs` and `manage` import before torch."""
    lines = path.read_text().splitlines()
    names = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    ours = [name for name in names if name.split(".")[0] in ("configs", "manage", "tools", "torch", "utils")]
    assert not ours or ours[0] != "torch", "write `import utils` above torch, as tools/export.py does"


@pytest.mark.parametrize(("own", "told"), [({}, "PASSIVE 6000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")])
def test_threads_are_told_to_sleep_unless_the_user_says_otherwise(own: dict, told: str) -> None:
    variables = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = f"import os, sys, utils; print(*map(os.getenv, {variables}), 'torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in variables} | own
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{told} False\n", done.stderr
