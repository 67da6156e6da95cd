"""What the entry points share."""

import ast
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO
from utils.cli import duration, map_files, progress, run_main
from utils.errors import UserError

ENTRIES = [REPO / "train.py", REPO / "evaluate.py", *sorted((REPO / "tools").glob("[a-z]*.py"))]
ENTRIES = [path for path in ENTRIES if '__name__ == "__main__"' in path.read_text()]


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("key 'lr': too large")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: key 'lr': too large\n")


def bar_of(is_terminal: bool, monkeypatch: pytest.MonkeyPatch, **options) -> str:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    for _ in progress(range(50), desc="epoch", **options):
        time.sleep(0.01)
    return stream.getvalue()


def test_a_log_gets_whole_lines_of_progress_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_of(False, monkeypatch) == "", "nothing in the first half minute"
    text = bar_of(False, monkeypatch, delay=0.1, mininterval=0.1, leave=False)
    assert "\r" not in text
    lines = text.splitlines()
    assert lines
    assert all(re.fullmatch(r"epoch: \d+ %, \d+ of 50, \d\d:\d\d, .* left", line) for line in lines), lines


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_of(True, monkeypatch).count("\r") >= 2


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (240, "4 min"), (12000, "3 h 20 min")])
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_threads_are_told_to_sleep_before_torch_is_loaded(path: Path) -> None:
    """By `utils`, which `configs` and `manage` import before torch."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.split(".")[0])
    ours = [name for name in names if name in ("configs", "manage", "tools", "torch", "utils")]
    assert not ours or ours[0] != "torch", "write `import utils` above torch, as tools/export.py does"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "evaluate", "tools.export", "manage.predictor"])
def test_the_environment_says_so_when_torch_is_loaded(module: str) -> None:
    code = (
        "import os, sys; sys.addaudithook(lambda event, a: event == 'import' and a[0] == 'torch' and "
        f"print(os.environ.get('OMP_WAIT_POLICY'))); import {module}"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "PASSIVE", done.stderr


# --- work on all cores ---
def die_at_seven(item: int) -> int:
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.slow
def test_a_killed_worker_ends_the_work_with_a_message():
    with pytest.raises(UserError, match="work: a worker process was killed"):
        map_files(die_at_seven, range(100), "work", workers=2)


WORK = "import os, sys; from utils.cli import map_files; map_files(os.system, [sys.argv[1]] * 200, 'x', workers=2)"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    pids = tmp_path / "pids"
    pids.touch()
    with subprocess.Popen([sys.executable, "-c", WORK, f"echo $PPID >> {pids}; sleep 0.2"], cwd=REPO) as parent:
        while len(workers := set(pids.read_text().split())) < 2:
            time.sleep(0.1)
        parent.kill()
    end = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
