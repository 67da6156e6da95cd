"""Two thousand spoilt files and configs: each is taken, or refused with a message that names it."""

import subprocess
import sys

import pytest

from tests.factory import REPO


@pytest.mark.slow
def test_two_thousand_cases_end_in_success_or_in_a_clear_refusal():
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "2000", "--seed", "0"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2000 cases, 0 failures" in done.stdout
