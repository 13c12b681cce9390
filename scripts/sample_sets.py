"""What the scripts that make data share: shards of captioned pictures, their tokenizer, and when a set is finished."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import string
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SETTINGS = "settings.json"  # written last: a folder that has it is finished


@dataclass(frozen=True)
class Sample:
    """One picture as it is stored. `about` is its JSON, with all its captions as `captions`, the first one first."""

    key: str
    jpeg: bytes
    about: dict[str, Any]

    @property
    def caption(self) -> str:
        return str(self.about["captions"][0])


def jpeg(picture: Image.Image) -> bytes:
    """Sharp edges need all the color resolution that there is."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


def require(*packages: str) -> None:
    """End with an error if a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: missing {', '.join(missing)}: pip install 'open_clip_ov2[demo]'")


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one shard, whole or not at all, and return how many samples it has. As webdataset's TarWriter writes it,
    whose import takes as long as drawing a thousand pictures."""
    unfinished, count = path.with_suffix(".unfinished"), 0
    with tarfile.open(unfinished, "w") as tar:
        for sample in samples:
            entries = {"jpg": sample.jpeg, "json": json.dumps(sample.about).encode(), "txt": sample.caption.encode()}
            for entry, content in entries.items():
                member = tarfile.TarInfo(f"{sample.key}.{entry}")
                member.size, member.mode, member.uname, member.gname = len(content), 0o444, "bigdata", "bigdata"
                tar.addfile(member, io.BytesIO(content))
            count += 1
    unfinished.replace(path)
    return count


def write_json(path: Path, content: Any) -> None:
    """In UTF-8, one entry a line."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_vocabulary(folder: Path, words: Iterable[str]) -> None:
    """Word pieces for `ov2 train --tokenizer`: letters, digits, and whole words; every other word is spelled.

    In the format and with the special ids of BERT's: [PAD] 0, bos 1, eos 2.
    """
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[bos]", "[eos]", "[UNK]", *letters, *(f"##{letter}" for letter in letters), *sorted(set(words))]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")


def reusable(out: Path, settings: dict[str, Any]) -> bool:
    """Whether OUT holds this very set; an error where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / SETTINGS
    if not path.exists():
        sys.exit(f"error: {out} exists and is not a finished set: name another folder or remove it")
    found, wanted = json.loads(path.read_text()), json.loads(json.dumps(settings))
    if found == wanted:
        return True
    keys = sorted(key for key in wanted | found if found.get(key) != wanted.get(key))
    differ = ", ".join(f"{key} {found.get(key)} (now {wanted.get(key)})" for key in keys if key != "fonts")
    sys.exit(f"error: {out} was made with other settings: {differ or 'fonts'}: name another folder or remove it")


def npm_packages(names: Iterable[str], folder: Path, what: str) -> Path:
    """Install npm packages into a folder and return that with the packages; ends with an error if npm cannot."""
    if shutil.which("npm") is None:
        sys.exit(f"error: npm is missing; it brings the {what} (Debian: apt-get install npm)")
    options = ["--no-save", "--no-package-lock", "--ignore-scripts", "--silent"]
    if subprocess.run(["npm", "install", "--prefix", str(folder), *options, *names]).returncode:
        sys.exit(f"error: npm could not install the {what}; its own message is above")
    return folder / "node_modules"
