"""Kernels whose results are the same bits every time: what makes a resumed run on GPUs bitwise the uninterrupted one.

On CPUs they are so without it. On GPUs the backward passes of attention and some matrix products add in the order in
which blocks happen to finish.
"""

from __future__ import annotations

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def make_deterministic() -> None:
    """Use such kernels alone from now on; called before anything is computed on a GPU, since cuBLAS reads it then.

    An operation that has none raises instead of going on: attention's flash and memory-efficient kernels take their
    deterministic backward only then (with ``warn_only`` they warn and stay as they were), and cuDNN's attention, which
    has none, is passed over.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    # a guard for code that reads what nobody wrote: slow
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
