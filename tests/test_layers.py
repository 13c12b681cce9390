"""The layers of docs/architecture.md. Oracle: the imports of every module, parsed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import open_clip_ov2

ROOT = Path(open_clip_ov2.__file__).parent
MAY_IMPORT = {  # package -> (our packages, third-party modules) beyond the standard library
    "core": ({"core"}, {"torch"}),
    "recipe": ({"recipe", "errors"}, {"tomli"}),  # tomli is tomllib before Python 3.11
    "convert": ({"convert", "errors"}, {"torch", "numpy", "tensorstore"}),
    "export": ({"export", "errors"}, {"torch", "safetensors", "transformers", "tokenizers", "onnxruntime"}),
    "data": ({"data", "errors"}, {"torch", "webdataset", "PIL", "numpy", "braceexpand", "simplejpeg"}),
    "evaluate": ({"evaluate", "data", "errors"}, {"torch", "numpy", "pycocoevalcap"}),
    "bench": ({"bench", "data", "runlog", "errors", "seam"}, {"torch", "matplotlib"}),
    "compare": ({"compare", "bench", "runlog", "recipe", "errors", "seam"}, {"matplotlib"}),
    "launch": ({"launch", "runlog", "recipe", "errors", "seam"}, {"submitit", "matplotlib", "torch"}),
    "runlog": ({"runlog", "errors"}, {"torch", "rich", "tensorboard", "matplotlib", "PIL", "numpy"}),
}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return found


def third_party(names: set[str]) -> set[str]:
    import sys

    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"open_clip_ov2"}


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("open_clip_ov2.")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_lower_layers_import_only_what_they_may(package: str) -> None:
    packages, modules = MAY_IMPORT[package]
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 1
    for file in files:
        names = imports(file)
        assert third_party(names) <= modules, file
        assert ours(names) <= packages, file


@pytest.mark.parametrize(("package", "module"), [("launch", "trainer.py"), ("bench", "worker.py")])
def test_launcher_and_benchmark_know_training_in_one_module_alone(package: str, module: str) -> None:
    knowing = {file.name for file in (ROOT / package).glob("*.py") if "seam" in ours(imports(file))}
    assert knowing == {module}


def test_comparisons_know_training_in_one_module_alone() -> None:
    knowing = {file.name for file in (ROOT / "compare").glob("*.py") if "seam" in ours(imports(file))}
    assert knowing == {"trainer.py"}


def test_only_the_seam_touches_open_clip() -> None:
    touching = {
        file.relative_to(ROOT).parts[0]
        for file in ROOT.rglob("*.py")
        if third_party(imports(file)) & {"open_clip", "open_clip_train"}
    }
    assert touching == {"seam"}


def test_nothing_is_rebound_outside_the_list() -> None:
    """`setattr` stands in patches.py alone."""
    for file in ROOT.rglob("*.py"):
        if file.name == "patches.py":
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setattr"], file


def test_files_stay_short() -> None:
    for file in [*ROOT.rglob("*.py"), *(ROOT.parent.parent / "scripts").glob("*.py")]:
        assert len(file.read_text().splitlines()) <= 300, file
