"""Icon families of the npm package `@iconify/json`: which of them are used, what their icons are called, and whose hand
drew them.

An icon's name such as `battery-charging-24-filled` is what it shows and how it is drawn; the words of style at its end
and beginning are taken off.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Licenses that allow copies and changes on condition of attribution at most; OFL-1.1: not to be sold by itself.
LICENSES = {
    "MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "Unlicense", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1",
}  # fmt: skip
# Logos, flags and emoji: the families of these categories, and those that are in another one or in none.
LEFT_OUT_CATEGORIES = {"Logos", "Emoji"}
LEFT_OUT = _words(
    """academicons brandico bx-logos catppuccin cif circle-flags devicon devicon-plain fa-brands fa6-brands
    file-icons flag flagpack fluent-emoji fontelico fxemoji gcp k8s material-icon-theme noto-v1 emojione-v1
    skill-icons unjs vscode-icons"""
)
LEFT_OUT_WORDS = _words(
    """logo logos brand wordmark bxl behance dribbble facebook github google instagram linkedin pinterest skype twitter
    whatsapp youtube"""
)
# Families by other people that continue or copy one another (from their names; drawings were not compared).
SAME_HAND = {
    "Cole Bemis": "Lucide Contributors",
    "Family": "Ben Sperry",
    "Google Inc": "Google",
    "MDI Community": "Google",
    "Material Design Authors": "Google",
    "Pictogrammers": "Google",
    "The WordPress Contributors": "WordPress",
}
# Words of style, and those that are one only in families where at least STYLE_SHARE of the icons begin or end with it.
STYLES = _words(
    """alt alt2 baseline bold broken bulk bxs duo duotone f fill filled flat glyph linear o outline outlined regular
    remix rounded sharp solid stroke thin twotone variant"""
)
FAMILY_STYLES = _words(
    """active alerted badged block circular color dark expressive i ios light line ltr md negative off one print r round
    rtl sc small three tone two four"""
)
STYLE_SHARE = 0.04
SIZE = re.compile(r"\d+(px|x\d+)?")


@dataclass(frozen=True)
class Family:
    """One family of icons, as its card lists it."""

    prefix: str
    name: str
    author: str
    license: str
    url: str

    @property
    def hand(self) -> str:
        """Whoever drew it: families of one hand are trained or held out together."""
        return SAME_HAND.get(self.author, self.author)


@dataclass(frozen=True)
class Icon:
    """An icon: what it shows in words, further captions, and its drawing as SVG without the outermost element."""

    family: str
    raw: str
    name: str
    captions: tuple[str, ...] = field(compare=False)
    box: tuple[float, float, float, float] = field(compare=False)  # left, top, width, height
    body: str = field(compare=False)
    label: str = ""

    @property
    def key(self) -> str:
        return f"{self.family}--{self.raw}"


def families(package: Path, all_licenses: bool) -> dict[str, Family]:
    """The families that are used, by prefix, sorted."""
    listed: dict[str, Any] = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    found = {}
    for prefix, about in sorted(listed.items()):
        license, author = about["license"], about["author"]
        if about.get("category") in LEFT_OUT_CATEGORIES or prefix in LEFT_OUT:
            continue
        if all_licenses or license.get("spdx") in LICENSES:
            url = license.get("url") or author.get("url", "")
            found[prefix] = Family(prefix, about["name"], author["name"], license.get("spdx", license["title"]), url)
    return found


def icons(package: Path, family: str) -> Iterator[Icon]:
    """The icons of a family, sorted by name; those that are hidden (withdrawn), logos and nameless ones left out."""
    content = json.loads((package / "json" / f"{family}.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = content["icons"]
    styles = styles_of(list(found))
    further: dict[str, list[str]] = {}
    for alias, about in content.get("aliases", {}).items():
        if set(about) == {"parent"}:  # and not another drawing, turned or flipped
            further.setdefault(about["parent"], []).append(shown(alias, styles))
    category = {raw: name.lower() for name, members in content.get("categories", {}).items() for raw in members}
    for raw, about in sorted(found.items()):
        name = shown(raw, styles)
        if not name or about.get("hidden") or LEFT_OUT_WORDS & set(raw.split("-")):
            continue
        with_category = [f"{name}, {category[raw]}"] if raw in category else []
        captions = dict.fromkeys((name, raw.replace("-", " "), *further.get(raw, ()), *with_category))
        measures = [("left", 0), ("top", 0), ("width", 16), ("height", 16)]
        left, top, width, height = (about.get(one, content.get(one, default)) for one, default in measures)
        yield Icon(family, raw, name, tuple(filter(None, captions)), (left, top, width, height), about["body"])


def styles_of(names: list[str]) -> set[str]:
    """The words of style of a family with these names."""
    ends = Counter(word for name in names for word in {name.split("-")[0], name.split("-")[-1]})
    return STYLES | {word for word in FAMILY_STYLES if ends[word] >= max(3, STYLE_SHARE * len(names))}


def shown(raw: str, styles: set[str]) -> str:
    """What an icon of this name shows: its words without style, sizes and numbers at the end; "" if nothing is left."""
    words = raw.replace("two-tone", "twotone").split("-")
    while len(words) > 1 and (words[-1] in styles or SIZE.fullmatch(words[-1])):
        words.pop()
    while len(words) > 1 and words[0] in styles:
        words.pop(0)
    words = [re.sub(r"(?<=[a-z]{3})\d+$", "", word) for word in words]
    return " ".join(words) if any(len(word) > 1 and word.isalpha() for word in words) else ""
