"""Which icons are trained and which are held out: whole families, and apart from that whole words."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from icon_names import Family, Icon

PACKAGE = "@iconify/json@2.2.535"
FORMAT = 1  # raise when the same settings give other data
CLASSES = 100
PROBE_TRAINED = 100  # icons of a class to train a probe on, at most
LARGEST_HAND = 0.05  # a hand that drew more of all icons than that is trained
HELD_OUT_WORDS = 16  # one word in so many is held out ...
COMMON = 1 / 200  # ... but none that more of the names have


@dataclass(frozen=True)
class Settings:
    """What the data depend on."""

    size: int
    names_in_families: int
    limit: int | None
    held_out: int
    held_out_families: int
    all_licenses: bool
    seed: int
    package: str = PACKAGE
    format: int = FORMAT


@dataclass(frozen=True)
class Plan:
    """Which icon is in which set, and what is held out."""

    sets: dict[str, list[Icon]]
    classes: tuple[str, ...]
    held_families: frozenset[str]
    held_words: frozenset[str]


def words_of(text: str) -> set[str]:
    """The words of a caption."""
    return set(text.replace(",", " ").split())


def draw_order(what: str, seed: int) -> bytes:
    """A place in a random order that depends on nothing else, the same in every run."""
    return hashlib.sha1(f"{seed}/{what}".encode()).digest()


def held_families(found: dict[str, Family], counts: Counter[str], settings: Settings) -> frozenset[str]:
    """So many families, all those of a hand together, in random order."""
    by_hand: dict[str, list[str]] = defaultdict(list)
    for prefix, family in found.items():
        by_hand[family.hand].append(prefix)
    held: list[str] = []
    for hand in sorted(by_hand, key=lambda hand: draw_order(f"hand/{hand}", settings.seed)):
        prefixes = by_hand[hand]
        fits = len(held) + len(prefixes) <= settings.held_out_families
        if fits and sum(counts[one] for one in prefixes) <= LARGEST_HAND * counts.total():
            held += prefixes
    return frozenset(held)


def chosen_classes(in_families: dict[str, set[str]]) -> tuple[str, ...]:
    """The names of one word that occur in most families, sorted."""
    single = [name for name in in_families if name.isalpha() and name.isascii() and len(name) > 2]
    return tuple(sorted(sorted(single, key=lambda name: (-len(in_families[name]), name))[:CLASSES]))


def held_words(in_families: dict[str, set[str]], classes: Iterable[str], seed: int) -> frozenset[str]:
    """The held-out words: a random share of those that are neither in many names nor a class."""
    counts = Counter(word for name in in_families for word in words_of(name) if word.isalpha() and len(word) > 2)
    rest = {word for word, count in counts.items() if count <= max(1, COMMON * len(in_families))} - set(classes)
    return frozenset(one for one in rest if draw_order(f"word/{one}", seed)[0] % HELD_OUT_WORDS == 0)


def some(icons: Iterable[Icon], number: int | None, seed: int) -> list[Icon]:
    """Icons in random order, at most so many."""
    return sorted(icons, key=lambda icon: draw_order(icon.key, seed))[:number]


def one_each(icons: Iterable[Icon], seed: int) -> list[Icon]:
    """In random order, one icon of each family and name: families have up to twenty drawings of one thing."""
    return list({(icon.family, icon.name): icon for icon in some(icons, None, seed)}.values())


def per_class(icons: Iterable[Icon], number: int) -> list[Icon]:
    """The first icons of each class, at most so many."""
    counts: Counter[str] = Counter()
    found = []
    for icon in icons:
        counts[icon.label] += 1
        found += [icon] if icon.label and counts[icon.label] <= number else []
    return found


def plan(found: dict[str, Family], everything: list[Icon], settings: Settings) -> Plan:
    """All sets, without a picture drawn."""
    in_families: dict[str, set[str]] = defaultdict(set)
    for icon in everything:
        in_families[icon.name].add(icon.family)
    common = {name: which for name, which in in_families.items() if len(which) >= settings.names_in_families}
    seed, classes = settings.seed, chosen_classes(common)
    held = held_families(found, Counter(icon.family for icon in everything), settings)
    words = held_words(common, classes, seed)
    new_name = {name: bool(words & words_of(name)) for name in common}

    def chosen(family_held: bool, name_held: bool) -> Iterator[Icon]:
        for icon in everything:
            if icon.name in common and (icon.family in held, new_name[icon.name]) == (family_held, name_held):
                label = icon.name if icon.name in classes else ""
                seen = [one for one in icon.captions if name_held or not words & words_of(one)]
                yield replace(icon, label=label, captions=tuple(seen))

    trained = list(chosen(False, False))
    drawings = {icon.body for icon in trained}
    unseen = [
        [icon for icon in chosen(*which) if icon.body not in drawings] for which in ((True, False), (False, True))
    ]
    sets = {
        "train": some(trained, settings.limit, seed),
        "unseen-families": one_each(unseen[0], seed)[: settings.held_out],
        "unseen-names": one_each(unseen[1], seed)[: settings.held_out],
        "probe-train": per_class(one_each(trained, seed), PROBE_TRAINED),
        "probe-test": [icon for icon in one_each(unseen[0], seed) if icon.label][: settings.held_out],
    }
    return Plan(sets, classes, held, words)
