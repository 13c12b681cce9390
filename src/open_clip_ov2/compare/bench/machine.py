"""What a benchmark ran on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def default_device() -> str:
    """As torch names it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_facts(device: str) -> dict[str, str]:
    facts = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": f"{properties.name}, {properties.total_memory / 1e9:.0f} GB",
            "cuda": str(torch.version.cuda),
            **facts,
        }
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": f"{_cpu_name()}, {usable} cores", **facts}


def _cpu_name() -> str:
    """Linux tells; elsewhere the architecture has to do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
