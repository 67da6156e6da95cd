"""What the entry points share."""

import io
import time

import pytest

from utils.cli import progress, run_main
from utils.errors import UserError


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise UserError("key 'lr': too large")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: key 'lr': too large\n")


@pytest.mark.parametrize(("is_terminal", "most_lines"), [(True, 50), (False, 3)])
def test_a_log_gets_few_lines_of_progress(is_terminal: bool, most_lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    for _ in progress(range(50)):
        time.sleep(0.015)
    lines = stream.getvalue().count("\r")
    assert 2 <= lines <= most_lines
    assert (lines > 3) == is_terminal
