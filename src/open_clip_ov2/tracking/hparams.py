"""The flags that a run wrote for TensorBoard's hparams tab, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TAG = "_hparams_/session_start_info"


def read_hparams(folder: Path) -> dict[str, Any]:
    """By name; empty if there are none."""
    if not list(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder), size_guidance={"images": 1, "tensors": 1, "scalars": 1})
    events.Reload()
    try:
        content = events.PluginTagToContent("hparams").get(TAG)
    except KeyError:
        return {}
    if content is None:
        return {}
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}
