"""Rendered pictures with exact captions: colored shapes and bar charts.

A picture is planned first (its one correct caption and the combination that is held out or trained
as a whole) and drawn afterwards, from one random generator, so that it depends on its seed alone.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, perm, pi, sin

from PIL import Image, ImageDraw

OVERSAMPLING = 2  # PIL does not smooth the edges of shapes: draw larger, then reduce.
HELD_OUT_SHARE = 10  # one combination in ten is held out
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (255, 135, 0),
    "yellow": (250, 215, 25),
    "green": (35, 155, 60),
    "blue": (40, 90, 225),
    "purple": (130, 45, 165),
    "pink": (255, 130, 195),
    "black": (30, 30, 30),
}
BAR_COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {"small": (0.09, 0.11), "large": (0.19, 0.215)}
CELLS = {
    " ".join(word for word in (row, column) if word) or "center": (x, y)
    for (row, y), (column, x) in itertools.product(
        (("top", 0.25), ("", 0.5), ("bottom", 0.75)), (("left", 0.25), ("", 0.5), ("right", 0.75))
    )
}
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
HIGHEST_BAR = 5


def is_held_out(combination: str) -> bool:
    """Whether a combination belongs to the held-out pictures: a hash, the same in every run."""
    return int.from_bytes(hashlib.sha1(combination.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Canvas:
    """A square picture addressed in fractions of its side."""

    image: Image.Image
    pen: ImageDraw.ImageDraw
    paper: tuple[int, int, int]

    @property
    def side(self) -> int:
        return self.image.width

    def polygon(self, points: list[tuple[float, float]], color: tuple[int, int, int]) -> None:
        self.pen.polygon([(x * self.side, y * self.side) for x, y in points], fill=color)

    def ellipse(self, x: float, y: float, radius: float, color: tuple[int, int, int]) -> None:
        box = [(value * self.side) for value in (x - radius, y - radius, x + radius, y + radius)]
        self.pen.ellipse(box, fill=color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: tuple[int, int, int]) -> None:
        self.pen.rectangle([round(value * self.side) for value in (x0, y0, x1, y1)], fill=color)


@dataclass(frozen=True)
class Plan:
    """What a picture shows, decided before it is drawn."""

    caption: str
    combination: str  # trained or held out as a whole
    label: str  # what it shows in a word or two, for probes: each occurs among the trained pictures
    draw: Callable[[Canvas, random.Random], None]


def shaded(name: str, rng: random.Random) -> tuple[int, int, int]:
    """The named color, a little lighter or darker."""
    shift = rng.randint(-14, 14)
    red, green, blue = (min(255, max(0, value + shift + rng.randint(-5, 5))) for value in COLORS[name])
    return red, green, blue


def draw_shape(canvas: Canvas, shape: str, x: float, y: float, r: float, color: tuple[int, int, int]) -> None:
    """One filled shape about (x, y), about 2 r wide."""
    if shape == "circle":
        canvas.ellipse(x, y, r, color)
    elif shape == "square":
        canvas.box(x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r, color)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], color)
    elif shape == "star":
        spokes = [(1.12 * r if i % 2 == 0 else 0.45 * r, i * pi / 5) for i in range(10)]
        canvas.polygon([(x + s * sin(a), y - s * cos(a)) for s, a in spokes], color)
    elif shape == "cross":
        canvas.box(x - r, y - 0.3 * r, x + r, y + 0.3 * r, color)
        canvas.box(x - 0.3 * r, y - r, x + 0.3 * r, y + r, color)
    else:
        turns = [i * pi / 30 for i in range(60)]
        arc = [(sin(t) ** 3, 13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) for t in turns]
        canvas.polygon([(x + r * u, y - r * (v + 2.5) / 15) for u, v in arc], color)


def article(word: str) -> str:
    return "an" if word == "orange" else "a"


def plan_one_shape(rng: random.Random) -> Plan:
    """One shape: its size, its color and its place among nine."""
    size, color, shape = rng.choice(tuple(SIZES)), rng.choice(tuple(COLORS)), rng.choice(SHAPES)
    place = rng.choice(tuple(CELLS))

    def draw(canvas: Canvas, rng: random.Random) -> None:
        x, y = (value + rng.uniform(-0.025, 0.025) for value in CELLS[place])
        draw_shape(canvas, shape, x, y, rng.uniform(*SIZES[size]), shaded(color, rng))

    caption = f"a {size} {color} {shape} at the {place}"
    return Plan(caption, f"one/{color}/{shape}/{place}", f"{color} {shape}", draw)


def plan_two_shapes(rng: random.Random) -> Plan:
    """Two different shapes, the left or the upper one named first."""
    first, second = rng.sample(tuple(itertools.product(COLORS, SHAPES)), 2)
    relation = rng.choice(("left of", "above"))

    def draw(canvas: Canvas, rng: random.Random) -> None:
        for (color, shape), along in ((first, 0.27), (second, 0.73)):
            along, across = along + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.06, 0.06)
            x, y = (along, across) if relation == "left of" else (across, along)
            draw_shape(canvas, shape, x, y, rng.uniform(0.14, 0.18), shaded(color, rng))

    caption = f"{article(first[0])} {' '.join(first)} {relation} {article(second[0])} {' '.join(second)}"
    return Plan(caption, f"two/{caption}", f"two, {relation}", draw)


def plan_count(rng: random.Random) -> Plan:
    """Two to six equal shapes."""
    count, color, shape = rng.choice(tuple(COUNTS)), rng.choice(tuple(COLORS)), rng.choice(SHAPES)

    def draw(canvas: Canvas, rng: random.Random) -> None:
        tone, radius = shaded(color, rng), rng.uniform(0.09, 0.115)
        for x, y in rng.sample(list(itertools.product((0.2, 0.5, 0.8), repeat=2)), count):
            x, y = x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)
            draw_shape(canvas, shape, x, y, radius, tone)

    plural = "crosses" if shape == "cross" else f"{shape}s"
    caption = f"{COUNTS[count]} {color} {plural}"
    return Plan(caption, f"count/{count}/{color}/{shape}", f"{COUNTS[count]} equal", draw)


def plan_shapes(rng: random.Random) -> Plan:
    """One shape, two shapes or a count of shapes."""
    return rng.choices((plan_one_shape, plan_two_shapes, plan_count), weights=(5, 4, 3))[0](rng)


def plan_chart(rng: random.Random) -> Plan:
    """A bar chart of two to four bars; lines across it mark each unit."""
    names = rng.sample(BAR_COLORS, rng.choice((2, 3, 4)))
    bars = [(name, rng.randint(1, HIGHEST_BAR)) for name in names]

    def draw(canvas: Canvas, rng: random.Random) -> None:
        left, right = rng.uniform(0.06, 0.12), rng.uniform(0.9, 0.96)
        bottom, unit = rng.uniform(0.9, 0.95), rng.uniform(0.155, 0.17)
        step = (right - left) / len(bars)
        gap, paper = step * rng.uniform(0.08, 0.16), canvas.paper
        for mark in range(1, HIGHEST_BAR + 1):
            canvas.box(left, bottom - mark * unit, right, bottom - mark * unit + 0.007, (205, 205, 205))
        for i, (name, value) in enumerate(bars):
            x0, x1 = left + i * step + gap, left + (i + 1) * step - gap
            canvas.box(x0, bottom - value * unit, x1, bottom, shaded(name, rng))
            for mark in range(1, value):
                canvas.box(x0, bottom - mark * unit - 0.006, x1, bottom - mark * unit + 0.006, paper)
        canvas.box(left - 0.012, bottom - 5.2 * unit, left, bottom, (60, 60, 60))
        canvas.box(left - 0.012, bottom, right, bottom + 0.012, (60, 60, 60))

    parts = [f"{name} {value}" for name, value in bars]
    caption = f"a bar chart with {' '.join(parts[:-1])} and {parts[-1]}"
    tallest = max(bars, key=lambda bar: bar[1])[0]  # of equal ones the first
    return Plan(caption, f"chart/{caption}", f"chart, {tallest} tallest", draw)


def plan_picture(kind: str, held_out: bool, rng: random.Random) -> Plan:
    """A plan of the kind (shapes or charts), from the held-out or from the trained combinations."""
    while True:
        plan = plan_shapes(rng) if kind == "shapes" else plan_chart(rng)
        if is_held_out(plan.combination) == held_out:
            return plan


def paint(plan: Plan, size: int, rng: random.Random) -> Image.Image:
    """The planned picture (RGB, size x size) on near-white paper."""
    side, tone = size * OVERSAMPLING, rng.randint(238, 255)
    paper = (tone, tone, tone)
    image = Image.new("RGB", (side, side), paper)
    plan.draw(Canvas(image, ImageDraw.Draw(image), paper), rng)
    return image.reduce(OVERSAMPLING)


def caption_words() -> set[str]:
    """The words that captions of shapes and charts are made of."""
    plurals = {"crosses", *(f"{shape}s" for shape in SHAPES if shape != "cross")}
    places = {word for place in CELLS for word in place.split()}
    others = {"a", "an", "at", "the", "of", "left", "above", "bar", "chart", "with", "and"}
    return {*COLORS, *SHAPES, *SIZES, *COUNTS.values(), *plurals, *places, *others}


def distinct_captions() -> dict[str, int]:
    """How many captions each kind's grammar can form."""
    looks = len(COLORS) * len(SHAPES)
    shapes = len(SIZES) * looks * len(CELLS) + 2 * looks * (looks - 1) + len(COUNTS) * looks
    charts = sum(perm(len(BAR_COLORS), bars) * HIGHEST_BAR**bars for bars in (2, 3, 4))
    return {"shapes": shapes, "charts": charts}
