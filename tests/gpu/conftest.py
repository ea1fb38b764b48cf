"""Every test in this folder carries the ``gpu`` mark and skips, with a message, where there is no Hopper GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def missing_device() -> str | None:
    """Why the GPU tests cannot run here, or None if they can. PTX for sm_90a runs on capability 9.0 alone."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"needs compute capability 9.0 (H100, H200); this device has {capability[0]}.{capability[1]}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = missing_device()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_addoption(parser: pytest.Parser) -> None:
    # Seen only when tests/gpu is named on the command line, which is how a GPU machine runs it.
    parser.addoption("--prepared", metavar="FOLDER", help="PTX and launches written by tests/gpu/substituted.py")
