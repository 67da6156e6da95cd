"""What the entry points share."""

import io
import re
import time

import pytest

from utils.cli import duration, progress, run_main
from utils.errors import UserError


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
    assert 1 <= len(lines) <= 6
    assert all(re.fullmatch(r"epoch: \d+ %, \d+ of 50, 00:0\d, .* left", line) for line in lines), lines


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_of(True, monkeypatch).count("\r") >= 2


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (240, "4 min"), (12000, "3 h 20 min")])
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
