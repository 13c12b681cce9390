"""Every code block of README and docs. Oracle: it runs. Shell lines of `ov2` go through the command's own parser.

docs/use.md is run as a whole, in order, in a folder that holds what it names: a run, a released checkpoint, Flax
parameters, a language model. A hub name there becomes that folder; tests/openclip/test_open_model.py has the hub.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from export_fixtures import make_language_model, make_run
from PIL import Image
from released_files import write_decoder, write_released
from square_shards import write_square_shards
from torch.distributed.run import get_args_parser

import open_clip_ov2
from open_clip_ov2.cli import COMMANDS, main
from open_clip_ov2.commands import bench
from open_clip_ov2.formats.targets import TARGETS
from open_clip_ov2.openclip.command.flags import build_parser
from open_clip_ov2.openclip.command.parse import parse

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import demo_train  # noqa: E402
import flag_pages  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "src" / "open_clip_ov2"
README = ROOT / "README.md"
USE = ROOT / "docs" / "use.md"
README_SIZES = {
    "ov2-vit-b-16": "ov2-vit-nano-8",
    "{00000..00999}": "{00000..00003}",
    '"train_num_samples": 10_000_000': '"train_num_samples": 64, "epochs": 1, "workers": 0',
}
HUB = "hf-hub:UCSC-VLAA/openvision2-vit-large-patch14-224-vision-only"


def small(text: str) -> str:
    """README's Python on 64 samples: its data and its model are made small, all else is as it stands."""
    for large, little in README_SIZES.items():
        assert large in text
        text = text.replace(large, little)
    return text


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def ov2_lines(text: str) -> Iterator[list[str]]:
    """Arguments of each `ov2` command; a line with "..." stands for more than it says."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("ov2 ") and "..." not in line:
            yield shlex.split(line, comments=True)[1:]


def check_parses(argv: list[str]) -> None:
    command, rest = argv[0], argv[1:]
    assert command in COMMANDS, command
    if command in ("submit", "sweep") and "--" in rest:
        rest, trained = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
        if command == "submit" and trained[0] == "captions":
            check_parses(trained)
        elif command == "submit":
            parse(trained, world_size=1, gpu=True)
    if command == "train":
        parse(rest, world_size=1, gpu=True)
    elif command == "plan":  # its flags are those of ov2 train
        assert main(argv) == 0
    elif argv[:2] == ["bench", "data"]:
        bench._loader_parser().parse_args(rest[1:])
    else:
        import_module(f"open_clip_ov2.commands.{command}")._parser().parse_args(rest)


def test_the_site_builds(tmp_path: Path) -> None:
    """Oracle: `mkdocs build --strict`, to which a link that leads nowhere or a name that is gone is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r'id="(open_clip_ov2[\w.]+)"', api)}
    assert set(open_clip_ov2.__all__) <= documented
    asked = [*re.findall(r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href)="(https?:[^"]+)', api)]
    assert asked == [], "a page that fetches something when it is read"


@pytest.mark.parametrize("page", flag_pages.PAGES)
def test_pages_of_flags_are_what_the_parsers_say(page: str) -> None:
    """Oracle: the parsers. A page that differs is written again by `python scripts/flag_pages.py`."""
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == flag_pages.PAGES[page]()


def test_every_flag_of_ours_is_explained() -> None:
    """Oracle: the parser. A row of the page with an empty cell explains nothing."""
    page = (ROOT / "docs" / "train_flags.md").read_text(encoding="utf-8")
    flags = [option for action in build_parser()._actions for option in action.option_strings]
    assert flags
    rows = {
        flag: next((row for row in page.splitlines() if row.startswith((f"| `{flag}", f"| <code>{flag}"))), "")
        for flag in flags
    }
    assert [flag for flag, row in rows.items() if len(row.split(" | ")[-1]) < 4] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_and_functions_that_pages_name_are_there(page: Path) -> None:
    """`core/loss.py:CaptionLoss`. Oracle: the source tree."""
    named = re.findall(r"`(\w[\w-]*/[\w./-]+\.(?:py|sh|toml))(?::(\w+))?`", page.read_text(encoding="utf-8"))
    for name, inside in named:
        found = [folder / name for folder in (PACKAGE, ROOT) if (folder / name).is_file()]
        assert found, f"{page.name}: {name}"
        assert not inside or re.search(rf"^(def|class) {inside}\b", found[0].read_text(), re.MULTILINE), (
            f"{name}:{inside}"
        )


def test_torchrun_leaves_our_flags_to_us() -> None:
    """Without the `--` it takes those that begin as its own do, such as --logs, or refuses them. Oracle: its parser."""
    argv = ["--logs", "demo/logs", "--name", "n", "--standalone"]
    read = get_args_parser().parse_args(demo_train.torchrun(argv))
    assert (read.training_script, read.training_script_args) == ("open_clip_ov2", ["train", *argv])
    named = [*PAGES, *PACKAGE.rglob("*.py")]
    lines = [line for page in named for line in page.read_text().splitlines() if "torchrun --nproc" in line]
    assert len(lines) > 4
    assert [line for line in lines if " -m open_clip_ov2 -- " not in line] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != USE], ids=lambda page: page.name)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lay_out(tmp_path)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(small(text) if page == README else text, str(page), "exec"), variables(64))
        elif language in ("bash", "sh", "console"):
            for argv in ov2_lines(text):
                check_parses(argv)
                if argv[0] == "export":  # the block after it uses what this one writes
                    assert main(argv) == 0, argv


def test_use_md_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    ran, names = 0, variables()
    here = {HUB: "local-dir:released", '"ov2-vit-nano-8", pretrained="logs': '"local-dir:logs/RUN", pretrained="logs'}
    for language, text in blocks(USE):
        if language == "python":
            for elsewhere, made in here.items():  # the hub's model, and a run of other sizes than nano's
                text = text.replace(elsewhere, made)
            exec(compile(text, str(USE), "exec"), names)
            ran += 1
        for argv in ov2_lines(text) if language == "bash" else ():
            check_parses(argv)
            if argv[0] != "train":  # tests/formats/test_push.py starts a real run from a bare file
                assert main(argv) == 0, argv
    assert ran >= 8
    with np.load("checkpoint.npz") as before, np.load("back.npz") as after:
        names_before = {name for name in before.files if name.startswith("params/")}
        assert set(after.files) == names_before
        assert all(np.array_equal(before[name], after[name]) for name in names_before)


@pytest.mark.parametrize("target", TARGETS)
def test_use_md_shows_the_example_of_each_export_target(target: str) -> None:
    """Oracle: the registry, which the model card takes its example from too."""
    folder = {"hf": "encoder", "timm": "timm-encoder", "open-clip": "stock", "ov2": "whole", "released": "for-them"}
    assert TARGETS[target].example_for(folder.get(target, target)) in USE.read_text(encoding="utf-8")


def variables(size: int = 56) -> dict[str, Any]:
    """`images` of `size` px: 56 is that of the run in lay_out, 64 that of ov2-vit-nano-8."""
    return {
        "__name__": "docs",
        "image": Image.effect_noise((90, 70), 60).convert("RGB"),
        "images": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),
    }


def lay_out(folder: Path) -> None:
    """The folders and files that the pages name."""
    make_run(folder / "logs" / "RUN")
    write_square_shards(folder / "shards", 4, 16)
    write_square_shards(folder / "held-out", 1, 10, start=1000)
    make_language_model(folder / "vicuna-7b")
    write_released(folder / "released", "l")
    write_decoder(folder / "released", "l")
    encoder = open_clip.create_model("ov2-vit-nano-8", decoder_cfg=None).visual.state_dict()
    torch.save(encoder, folder / "open_clip_pytorch_model.bin")
    (folder / "checkpoint.npz").symlink_to(ROOT / "tests" / "golden" / "concat_prefix_keep0.35.npz")
    Image.effect_noise((70, 60), 80).convert("RGB").save(folder / "cat.png")
