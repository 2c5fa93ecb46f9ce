"""True float32 arithmetic for every verdict, and a description of training's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def _operations() -> tuple[Any, ...]:
    """Return PyTorch's switches for float32's internal precision, one per kind of operation."""
    b: Any = torch.backends  # mypy does not know these switches.
    return b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.rnn, b.mkldnn.matmul


@contextmanager
def true_float32() -> Iterator[None]:
    """Compute in float32 of 24 bits within the body.

    Float32 operations use no TF32 and no bfloat16 inside, and no autocast is active. cuDNN takes
    deterministic kernels and does not choose them by timing. The settings from before are restored
    afterwards. The switches belong to the whole process, autocast to the thread. A network that
    enters autocast in its own forward pass, or converts its own weights, keeps doing so: that is
    part of the network.

    Usable as a decorator, too.
    """
    cudnn = torch.backends.cudnn
    before = [operation.fp32_precision for operation in _operations()]
    # The older switches cannot be read where the newer ones contradict them. The newer ones are
    # restored in any case.
    convolutions = _read(lambda: cudnn.allow_tf32)
    products = _read(lambda: torch.backends.cuda.matmul.allow_tf32)
    precision = _read(torch.get_float32_matmul_precision)
    kernels = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        # allow_tf32=False alone is not enough: it falls back on torch.backends.fp32_precision,
        # which may be tf32.
        for operation in _operations():
            operation.fp32_precision = "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = kernels
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        if products is not None:
            torch.backends.cuda.matmul.allow_tf32 = products
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for operation, value in zip(_operations(), before, strict=True):
            operation.fp32_precision = value


def _read(switch: Callable[[], Any]) -> Any:
    """Return the state of an older switch, or None if a newer switch contradicts it."""
    try:
        return switch()
    except RuntimeError:
        return None


def describe(device: str, precision: str) -> str:
    """Describe the arithmetic of a training step, as model.json records it.

    Args:
        device: "cpu" or "cuda".
        precision: ``train.precision``.

    Returns:
        "float32" or "bfloat16 autocast"; with ", TF32 in convolutions" or "... and matrix products"
        on a GPU where PyTorch's switches allow it.
    """
    arithmetic = "float32" if precision == "float32" else f"{precision} autocast"
    if device != "cuda":
        return arithmetic
    convolutions, _, products, *_ = _operations()
    kinds = (("convolutions", convolutions), ("matrix products", products))
    lowered = [name for name, operation in kinds if operation.fp32_precision == "tf32"]
    return f"{arithmetic}, TF32 in {' and '.join(lowered)}" if lowered else arithmetic
