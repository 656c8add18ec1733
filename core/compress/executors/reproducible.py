"""Makes gradients come out the same in every run."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def reproducible(device: str | torch.device) -> Iterator[None]:
    """In this context, a GPU adds up in a fixed order. The caller's random state is restored afterwards.

    cuDNN's attention is disabled: its gradients differ from run to run. It also makes a new plan for every length of text, which takes
    longer than a step.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads this variable when it starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[torch.device(device)] if cuda else []):
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """Compute a loss's gradients within `reproducible`. There, a warning alone would let attention add up in any order."""
    torch.use_deterministic_algorithms(True)
    try:
        loss.backward(gradient)  # type: ignore[no-untyped-call]
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
