"""Around all that an entry point does: one process speaks for all, and what went wrong is told once."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from manage.distributed import is_launched, means_lost_process
from utils.errors import UserError

LAST_WORD = """
import os, sys, time
for _ in range(600):
    try:
        os.kill(int(sys.argv[1]), 0)
    except OSError:
        break
    time.sleep(0.1)
print("error: " + sys.argv[2], file=sys.stderr)
"""


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Around all that an entry point does: leaves the process group, and says what went wrong once, not once a process.

    A process that fails ends the others: their next collective call breaks, and so does the run, at once.
    """
    try:
        yield
    except UserError as error:
        _tell_once(error)
        raise
    except RuntimeError as error:
        if not means_lost_process(error):
            raise
        lost = UserError(
            "a process of this run is gone or hangs, so the others end too; the newest checkpoint stands, and a "
            "training goes on from it with --resume"
        )
        _tell_once(lost)
        raise lost from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell_once(error: UserError) -> None:
    """With torchrun: ends this process silently if another one speaks, and on a screen speaks after the launcher.

    The launcher ends with thirty lines of its own, so a small process waits for its end.
    """
    if not _speaks_first():
        raise SystemExit(2) from None
    if is_launched() and sys.stderr.isatty():
        subprocess.Popen([sys.executable, "-c", LAST_WORD, str(os.getppid()), str(error)], start_new_session=True)
        raise SystemExit(2) from None


def _speaks_first() -> bool:
    """Whether no other process of this run has told of a fault yet; in doubt, True.

    Asks the store that torchrun keeps, which is there before the process group and outlives every process of it.
    """
    if not is_launched():
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"hseg/faults/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True  # better twice than not at all
