"""What ended a run, in one line."""

import traceback
from pathlib import Path

import torch

from configs.config import Config
from utils.errors import UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the machine; CPU allocators say so only in words."""
    signs = ("can't allocate memory", "not enough memory", "cannot allocate memory")
    words = isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in signs)
    return words or isinstance(error, torch.OutOfMemoryError | MemoryError)


def one_line(error: Exception, config: Config, where: str, folder: Path) -> str:
    """What went wrong and what to do; the traceback of what nobody foresaw goes to a file in `folder`."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"{where}: out of memory at batch_size {config.batch_size} and crop_size {config.crop_size}; lower "
            "batch_size (with a larger accumulate a step keeps its photos), crop_size or short_side"
        )
    reason = (str(error).splitlines() or [""])[0]
    path = folder / "traceback.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        more = f" (see {path})"
    except OSError:
        more = ""
    hint = "; set compile=false" if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) else ""
    return f"{where}: {type(error).__name__}: {reason}{more}{hint}"
