"""Less memory for training: computing again, in the backward pass, what is cheap to compute."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def recomputed(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> AbstractContextManager:
    """Within, autograd keeps `inputs` wherever it would keep `result`, which is `function(*inputs)`.

    The backward pass calls `function` again, so the gradient has the same bits. It saves memory where the inputs are
    kept anyway, and time is lost only on `function`. Compiled code decides by itself what to compute again.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    kept = [tensor.detach() for tensor in inputs]
    alive = weakref.ref(result)  # autograd holds on to both functions below

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved is alive() else saved

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        with torch.no_grad():
            return function(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
