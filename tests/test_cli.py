"""The `ov2` command itself. Oracle: exit status and what is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import open_clip_ov2
from open_clip_ov2.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"ov2 {name}" in out for name in COMMANDS)


def test_module_entry_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "open_clip_ov2", "bake"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("ov2: error: 'bake' is not a command of ov2")


@pytest.mark.parametrize(("argv", "statuses"), [(["train", "--help"], {141}), (["eval", "--help"], {0, 141})])
def test_a_reader_that_leaves_costs_no_traceback(argv: list[str], statuses: set[int]) -> None:
    """`ov2 ... | head -1`. Oracle: a real pipe, whose reader is gone before the first line.

    141 is 128 + SIGPIPE; argparse, which prints the help of all commands but `train`, ignores a closed pipe itself if
    the text is longer than Python's buffer.
    """
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, "-m", "open_clip_ov2", *argv], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.communicate()[1].decode() == ""
    assert process.returncode in statuses


def test_the_version_stands_in_one_place() -> None:
    """Oracle: the metadata that pip made of pyproject.toml, where no other file may repeat it."""
    assert open_clip_ov2.__version__ == version("open_clip_ov2")
    project = (ROOT / "pyproject.toml").read_text()
    assert project.count(f'version = "{open_clip_ov2.__version__}"') == 1
    sources = [*(ROOT / "src").rglob("*.py")]
    assert [file for file in sources if f'"{open_clip_ov2.__version__}"' in file.read_text()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([command, "--help"])
    except SystemExit as leave:  # argparse's own way out
        status = leave.code
    assert status == 0
    assert f"ov2 {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["caption", __file__, "--checkpoint", "nowhere"], "nowhere: no such file, folder or model"),
        (["eval", "nowhere", "--data", "x.tar"], "nowhere: no such file, folder or model"),
        (["eval", ".", "--data", "x.tar", "--tasks", "spelling"], "--tasks: unknown task 'spelling'"),
        (["plot", "nowhere", "--out", "x.png"], "no results.jsonl"),
        (["caption", "--out"], "ov2 caption:"),
    ],
)
def test_slips_are_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("ov2: error: ")
    assert expected in err
    assert "\n" not in err


def test_supported_versions_of_python_agree() -> None:
    """Oracle: the classifiers of pyproject.toml, against the matrix of CI and what README and setup_venv.sh say."""
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    matrix = re.search(r"python-version: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert matrix
    assert re.findall(r"3\.\d+", matrix[1]) == versions
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "scripts" / "setup_venv.sh").read_text()
    assert f'requires-python = ">={versions[0]}"' in (ROOT / "pyproject.toml").read_text()
