"""One run and one language model for all exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_fixtures import Run, make_language_model, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("exports") / "run")


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language_model")
    make_language_model(folder)
    return folder
