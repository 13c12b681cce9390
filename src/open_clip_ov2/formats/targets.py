"""The formats that `ov2 export` and `ov2 push` know. A new one is a module with a `Target`, and a line here."""

from __future__ import annotations

from importlib.util import find_spec

from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.formats import authors, hf, llava, onnx, open_clip, timm
from open_clip_ov2.formats.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        hf.TARGET,
        llava.TARGET,
        timm.TARGET,
        open_clip.TARGET,
        open_clip.WHOLE_TARGET,
        authors.TARGET,
        onnx.TARGET,
    )
}
# A push has no flags of a format's own.
PUSHABLE = [name for name, target in TARGETS.items() if not target.options]


def target_of(name: str) -> Target:
    """Raises UserError for an unknown name, and for packages that the format needs and that are not installed."""
    if name not in TARGETS:
        raise unknown_key("--to", name, TARGETS, "target")
    missing = [module for module in TARGETS[name].modules if find_spec(module) is None]
    if missing:
        raise UserError(f"--to {name} needs {', '.join(missing)}: pip install 'open_clip_ov2[export]'")
    return TARGETS[name]
