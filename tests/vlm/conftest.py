"""A tiny LLaVA's parts, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import export_fixtures
import pytest
import tiny_llava

pytest.importorskip("trl", reason="TRL needs Python 3.11")
sys.path.insert(0, str(Path(__file__).parents[1] / "openclip"))

from training import _SERVER

_SERVER.set_forkserver_preload(["open_clip_ov2.openclip.run.runner", "training", "open_clip_ov2.vlm.vlm_run"])


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """encoder/, lm/, data/ and recipe.toml."""
    folder = tmp_path_factory.mktemp("vlm")
    export_fixtures.make_run(folder / "encoder")
    tiny_llava.make_language_model(folder / "lm")
    tiny_llava.make_conversations(folder / "data", 20)
    tiny_llava.write_recipe(folder / "recipe.toml")
    return folder
