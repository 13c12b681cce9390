from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def found() -> Any:
    from made_up import made_up

    return made_up()
