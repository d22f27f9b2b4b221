"""An error that a GPU raises, as an illegal instruction, loses the process its CUDA context: nothing runs after it."""

from __future__ import annotations

import os

import pytest
import torch


def end_if_lost() -> None:
    """End the process where its CUDA context is lost, so that the tests after it do not fail for it.

    Waits for the GPU, so that the test that asked for the work is the one that meets the error. xdist counts the test
    that was running as failed and starts another process for the rest; without xdist the session ends.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the CUDA context is lost: {error}", returncode=1)
