"""The rules of docs/architecture.md. Oracle: the source of every module, parsed."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
from layers import MAY_IMPORT, PAGE, ROOT, TOP, Layer, with_table

FILES = sorted(ROOT.rglob("*.py"))
SCRIPTS = sorted((ROOT.parents[1] / "scripts").glob("*.py"))
LONGEST_FUNCTION, LONGEST_FILE, MOST_FILES = 40, 300, 18
PACKAGES = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES} - {""}
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}


def layer_of(module: str) -> str:
    """The row of MAY_IMPORT that a module stands in: its package, or itself at the top level; empty for the door."""
    module = module.removesuffix(".__init__")
    if module in MAY_IMPORT:
        return module
    return module.rpartition(".")[0]


def imports(file: Path) -> set[str]:
    """Absolute names of the modules imported anywhere in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if name.removeprefix("open_clip_ov2.") in MODULES | PACKAGES}
            found |= submodules if submodules == names else {module, *submodules}
    return found


def ours(names: set[str]) -> set[str]:
    """Layers of the modules of ours among `names`; the door itself is the empty name."""
    inside = {
        name.removeprefix("open_clip_ov2").removeprefix(".") for name in names if name.split(".")[0] == "open_clip_ov2"
    }
    return {layer_of(name) for name in inside}


def others(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"open_clip_ov2"}


def rule(file: Path) -> tuple[str, Layer]:
    name = layer_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    return name, MAY_IMPORT.get(name, TOP)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_what_its_package_may(file: Path) -> None:
    name, layer = rule(file)
    if file.name == "__main__.py":
        name, layer = "__main__", Layer("cli", "", "")
    names = imports(file)
    assert ours(names) - {name, ""} <= set(layer.ours.split()), f"{name} imports another package of ours"
    assert others(names) <= set(layer.others.split()), f"{name} imports a library that it should not know"


def test_every_package_has_a_row() -> None:
    assert {name for name in PACKAGES if list((ROOT / name.replace(".", "/")).glob("*.py"))} <= set(MAY_IMPORT) | {
        "compare.bench.models"
    }


def test_rows_go_from_the_bottom_up_so_there_is_no_circle() -> None:
    seen: set[str] = set()
    for name, layer in MAY_IMPORT.items():
        assert set(layer.ours.split()) <= seen, name
        seen.add(name)


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run python tests/layers.py"


def test_files_and_folders_stay_small() -> None:
    for file in [*FILES, *SCRIPTS]:
        assert len(file.read_text().splitlines()) <= LONGEST_FILE, file
    for folder, count in Counter(file.parent for file in FILES).items():
        assert count <= MOST_FILES, f"{folder}: {count} files"


def test_no_file_name_stands_twice_outside_commands() -> None:
    names = Counter(file.name for file in FILES if "commands" not in file.parts and not file.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_functions_stay_short() -> None:
    long = []
    for file in [*FILES, *SCRIPTS]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{file.name}: {node.name} has {lines} lines"] if lines > LONGEST_FUNCTION else []
    assert long == []


DOCUMENTED = {"_replace", "_exit"}  # of NamedTuple and os: public for all their underscore


def private_names(tree: ast.Module) -> set[str]:
    """Attributes and imported names that begin with one underscore, and `__class__` where it is assigned."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found |= {node.attr} if node.attr != "__class__" or isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("open_clip_ov2"):
            found |= {alias.name for alias in node.names} | set((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            found |= {str(value.value) for value in node.args[1:2] if isinstance(value, ast.Constant)}
    return {name for name in found if name == "__class__" or (name.startswith("_") and not name.startswith("__"))}


def own_names(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, variables, parameters, and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in ("self", "cls") else set()
    return found - {"__class__"}


def uses_of_private_names(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(file, name) of every private name that none of the sources defines. `sources`: content by file."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    ours = DOCUMENTED.union(*map(own_names, trees.values()))
    return {(file, name) for file, tree in trees.items() for name in private_names(tree) - ours}


def test_private_names_of_others_are_those_that_are_listed() -> None:
    """Both ways: none is used that is not listed, and none is listed that is not used."""
    from open_clip_ov2.openclip.private_names import PRIVATE_NAMES

    sources = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
    listed = {(file, private.name) for private in PRIVATE_NAMES for file in private.files.split()}
    listed = {(file, name) for file, name in listed if name.startswith("_")}  # the rest is undocumented, not private
    assert uses_of_private_names(sources) == listed


@pytest.mark.parametrize(
    "line",
    ["visual._embeds(images)", "from open_clip.model import _pool", "block.__class__ = Fast", "import open_clip._new",
     "getattr(visual, '_pool')"],
)  # fmt: skip
def test_an_unlisted_private_name_is_found_in_any_file(line: str) -> None:
    """Oracle: a line that uses one, added to a real file that uses none."""
    source = (ROOT / "core" / "packing.py").read_text()
    assert uses_of_private_names({"core/packing.py": source}) == set()
    assert len(uses_of_private_names({"core/packing.py": f"{source}\n{line}\n"})) == 1


def test_nothing_is_rebound_outside_the_list() -> None:
    """`setattr` stands in patches.py alone."""
    for file in FILES:
        if file.name == "patches.py":
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setattr"], file
