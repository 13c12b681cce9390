"""Writes docs/train_flags.md and docs/commands.md: every flag of every `ov2` command, read from its parser.

python scripts/flag_pages.py          # write both pages; tests/test_docs.py compares them with the parsers
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

from open_clip_train.params import parse_args as open_clip_parse_args

from open_clip_ov2.cli import COMMANDS, main
from open_clip_ov2.openclip.command.flags import build_parser
from open_clip_ov2.openclip.command.refusals import ALWAYS, NEEDS, OF_DATA, OTHERS, WITH_OV2
from open_clip_ov2.recipe.stage import FLAGS

DOCS = Path(__file__).parent.parent / "docs"
NOTE = "<!-- written by scripts/flag_pages.py -->"
ADDRESS = re.compile(r"https?://\S+")
# Flags of OpenCLIP that are obeyed, with what docs/train_flags.md adds to its help: an effect, or a default of ours.
HERE = {
    "imagenet_val": 'ov2 models classify by the likelihood of "a photo of a CLASS."',
    "imagenet_v2": "the same; a folder of folders 0 to 999, which is not downloaded",
    "copy_codebase": "the source of open_clip_ov2, open_clip and open_clip_train, to RUN/code, when the run begins",
    "remote_sync": "to URL/NAME, through fsspec: s3://, gs://, a folder and others",
    "remote_sync_protocol": "both go through fsspec; s3 alone insists on s3://",
    "log_local": "out-RANK.log, of the first process of each further machine",
    "resume": "or latest, as without the flag; docs/openclip.md",
    "save_most_recent": "here a link to the newest checkpoint, and one is written after each epoch",
    "delete_previous_checkpoint": "the best one and each stage's last are kept; instead of --keep-checkpoints",
    "logs": "None is refused, because a run is resumed from its folder",
    "name": "MODEL-RECIPE-HASH by default, a hash of the configuration, so that the same command finds its run",
    "lr": "5e-4 by default with adamw; other optimizers need it",
    "beta1": "0.9 by default with ov2 models and with adamw",
    "beta2": "0.95 by default with ov2 models; with adamw 0.98 for other ViTs, 0.999 for the rest",
    "eps": "1e-8 by default with ov2 models; with adamw 1e-6 for other ViTs, 1e-8 for the rest",
    "precision": "amp_bf16 by default for ov2 models on a GPU, amp for others there, fp32 on a CPU",
    "model": "required",
    "device": "cpu by default where there is no GPU",
    "report_to": "trackio too, and all (tensorboard and wandb)",
}


class _Parser(Exception):
    """Carries the parser of a command out of the command."""


def _stop(parser: argparse.ArgumentParser, *_: object) -> None:
    raise _Parser(parser)


def parser_of(*command: str) -> argparse.ArgumentParser:
    """The parser that `ov2 COMMAND` reads its flags with."""
    return _caught(lambda: main([*command, "--help"]))


def _caught(call: Callable[[], object]) -> argparse.ArgumentParser:
    with patch.object(argparse.ArgumentParser, "parse_known_args", _stop):
        try:
            call()
        except _Parser as found:
            parser = found.args[0]
            assert isinstance(parser, argparse.ArgumentParser)
            return parser
    raise ValueError("the call has no parser")


def _text(parser: argparse.ArgumentParser, action: argparse.Action, notes: Mapping[str, str]) -> str:
    """The help of one flag for a table's cell, with the default that it names, and what this project says of it."""
    text = " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else ""
    if "default" not in text.lower() and _has_default(action):
        text = f"{text.rstrip('.')} (default: {action.default})".strip()
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    text = ADDRESS.sub(lambda found: f"<{found[0]}>".replace("\\", ""), text)
    return f"{text.rstrip('.')}{notes[action.dest]}" if action.dest in notes else text


def _has_default(action: argparse.Action) -> bool:
    return action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, False, "", [], ())


def _name(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if not action.choices else "")
    if action.choices and not action.metavar:
        value = "|".join(map(str, action.choices))
    if isinstance(value, tuple):
        value = " ".join(value)
    shown = ", ".join(action.option_strings)
    if action.nargs != 0:
        shown = f"{shown} {value}".strip()
    if "|" in shown:  # within backticks, GitHub wants it escaped and Python-Markdown does not
        return f"<code>{shown.replace('|', '&#124;')}</code>"
    return f"`{shown}`"


def _tables(parser: argparse.ArgumentParser, notes: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """One table of the flags that stand in no group, and one for each group."""
    groups: dict[str, list[argparse.Action]] = {}
    for group in parser._action_groups:
        title = "" if group.title in ("options", "positional arguments") else str(group.title)
        groups.setdefault(title, []).extend(group._group_actions)
    for title, actions in groups.items():
        shown = [one for one in actions if one.help != argparse.SUPPRESS]
        shown = [one for one in shown if not isinstance(one, (argparse._HelpAction, argparse._SubParsersAction))]
        rows = [f"| {_name(action)} | {_text(parser, action, notes)} |" for action in shown]
        if rows:
            heading = [f"**{title[:1].upper()}{title[1:]}**\n"] if title else []
            yield "\n".join([*heading, "| flag | meaning |", "| --- | --- |", *rows, ""])


def _prose(parser: argparse.ArgumentParser, text: str) -> Iterator[str]:
    """A description or an epilog; as it stands where its lines are laid out by hand."""
    if not text:
        return
    if issubclass(parser.formatter_class, argparse.RawDescriptionHelpFormatter) and "\n" in text:
        yield f"```text\n{text.strip()}\n```\n"
    else:
        text = " ".join(text.split())
        yield f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '?')) else '.'}\n"


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _section(name: str, parser: argparse.ArgumentParser, what: str) -> Iterator[str]:
    yield f"## {name}\n"
    yield from _prose(parser, parser.description or what)
    yield from _tables(parser)
    yield from _prose(parser, parser.epilog or "")
    for word, below in _subcommands(parser).items():
        yield from _section(f"{name} {word}", below, below.description or "")


def commands_page() -> str:
    lines = [
        NOTE,
        "# Commands\n",
        "`ov2 COMMAND --help` prints the same; [ov2 train](train_flags.md) has its own page.\n",
    ]
    for command, what in COMMANDS.items():
        if command != "train":
            lines += _section(f"ov2 {command}", parser_of(command), what)
        if command == "bench":
            lines += _section("ov2 bench data", parser_of("bench", "data"), "")
    return "\n".join(lines)


def _notes() -> dict[str, str]:
    """By the parsers' names, for a table's cell."""
    notes: dict[str, str] = {}
    for rule in (*ALWAYS, *WITH_OV2, *OTHERS, *OF_DATA, *NEEDS):
        others = "other models" if rule.why.startswith("it is for ov2 models") else "some models"
        where = rule.where.format(model="ov2 models" if rule in WITH_OV2 else others)
        for flag in rule.flags.split(", "):
            name, _, value = flag.removeprefix("--").replace("-", "_").partition(" ")
            refused = f"`{value}` is refused{where}" if value else f"Refused{where}"
            notes[name] = f"{notes.get(name, '')}. **{refused}**: {rule.why}"
    return notes | {name: f". **Here**: {what}{notes.get(name, '')}" for name, what in HERE.items()}


def _stage_keys() -> str:
    keys = [f"`{key}`" if key == flag else f"`{key}` (`--{flag}`)" for key, flag in FLAGS.items() if key != "name"]
    return (
        "A recipe file (`configs/*.toml`) has `model`, a table `[train]` of flags by their names without dashes, and a "
        "`[[stage]]` for each stage; `--stage 112:samples=2M,lr=1e-3` is such a stage on the command line. The keys of "
        "a stage are flags too; in brackets those that have another name there: "
        f"{', '.join(keys)}; and `name`, for the log.\n"
    )


def train_page() -> str:
    lines = [
        NOTE,
        "# Flags of ov2 train\n",
        "```bash\nov2 train --model MODEL --train-data SHARDS ...\n```",
        "The first tables list the flags of this project, the last one those of OpenCLIP, with what is refused.\n",
        _stage_keys(),
        "## Flags of this project\n",
        *_tables(build_parser(), _notes()),
        "## Flags of OpenCLIP\n",
        *_tables(_caught(lambda: open_clip_parse_args([])), _notes()),
    ]
    return "\n".join(lines)


PAGES = {"train_flags.md": train_page, "commands.md": commands_page}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
