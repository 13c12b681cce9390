"""One real SLURM of two nodes for all tests of this folder."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "openclip"))

from slurm_cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(f"no SLURM for tests: {why}")
    # Short: the path stands in every log's name, and SLURM limits those.
    folder = tempfile.TemporaryDirectory(prefix="ov2-slurm-", ignore_cleanup_errors=True)
    with folder as name, Cluster(Path(name)) as running:
        yield running
