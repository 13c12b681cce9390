from __future__ import annotations

import pytest
from made_up import made_up

from open_clip_ov2.compare.results import Found


@pytest.fixture
def found() -> Found:
    return made_up()
