"""Which OpenCLIP this plugin was checked with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

CHECKED = "3.3"


def check_open_clip() -> str:
    """The version of open_clip_torch installed. Raises ImportError, with what to do, for any but 3.3.x."""
    try:
        found = version("open_clip_torch")
    except PackageNotFoundError:
        found = ""
    if not found.startswith(f"{CHECKED}."):
        raise ImportError(
            f"open_clip_ov2 works with open_clip_torch {CHECKED}.x, and found {found or 'none'}: "
            f"pip install 'open_clip_torch[training]=={CHECKED}.*'"
        )
    return found


def missing_name(name: str) -> ImportError:
    """The error, in one line, for a name that this plugin needs and that the installed version lacks."""
    top = name.split(".")[0]
    package = f"open_clip_torch[training]=={CHECKED}.*" if top.startswith("open_clip") else top
    return ImportError(
        f"open_clip_ov2 needs {name}, which the installed version does not have; pip install --upgrade '{package}'"
    )
