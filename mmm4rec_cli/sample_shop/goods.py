"""What the sample shop sells: items with a colour and a pattern to see, a material and a kind to read about.

Colour and pattern never occur in a text, material never in a picture, so each modality carries what the other lacks.
All domains speak of the same colours, patterns and materials; only their kinds of thing, brands and items differ.
"""

from dataclasses import dataclass

import numpy as np

HUES = {"red": 2, "amber": 46, "green": 115, "teal": 170, "blue": 222, "violet": 288}
"""Colour families and their hue in degrees: what pictures show."""

PATTERNS = ("plain", "rings", "posts", "slants")
"""Patterns on the drawn thing: none, horizontal, vertical and diagonal stripes."""

MATERIALS = {
    "wood": (("oak", "walnut", "beech"), ("carved", "grained", "turned")),
    "metal": (("steel", "brass", "iron"), ("forged", "riveted", "hammered")),
    "clay": (("stoneware", "porcelain", "terracotta"), ("glazed", "fired", "thrown")),
    "cloth": (("linen", "cotton", "canvas"), ("woven", "stitched", "quilted")),
    "glass": (("crystal", "glass", "quartz"), ("blown", "etched", "bevelled")),
}
"""Material families with their nouns and adjectives: what titles and descriptions tell."""

COLOUR_NAMES = tuple(HUES)
MATERIAL_NAMES = tuple(MATERIALS)
N_COLOURS, N_PATTERNS, N_MATERIALS = len(HUES), len(PATTERNS), len(MATERIALS)


@dataclass(frozen=True)
class Line:
    """One domain's line of goods."""

    domain: str
    code: str
    """Prefix of the domain's raw ids, so that no two domains share one."""
    n_users: int
    n_items: int
    mean_extra: float
    """Mean number of interactions of a user beyond the fewest."""
    kinds: tuple[str, ...]
    brands: tuple[str, ...]
    places: tuple[str, ...]


SOURCES = (
    Line(
        "shop-kitchen", "KI", 1000, 200, 5.0,
        ("mug", "bowl", "tray", "jug", "plate", "ladle", "canister", "trivet"),
        ("Hearthwell", "Saltmoor", "Pell", "Nordlund", "Quince"),
        ("the stove", "the breakfast table", "a crowded shelf", "the pantry", "the long table"),
    ),
    Line(
        "shop-toys", "TO", 1000, 200, 5.0,
        ("puzzle", "rattle", "robot", "castle", "duck", "train", "drum", "doll"),
        ("Tumbletop", "Otter", "Kasper", "Moonbarn", "Piccolo"),
        ("the playroom", "a rainy afternoon", "the back seat", "the sandpit", "small hands"),
    ),
    Line(
        "shop-outdoor", "OU", 1000, 200, 5.0,
        ("lantern", "flask", "stool", "hamper", "bell", "cup", "crate", "windbreak"),
        ("Fellside", "Longacre", "Brackwater", "Torr", "Heather"),
        ("the campsite", "a windy ridge", "the boat", "the back of the van", "the river bank"),
    ),
)  # fmt: skip
"""Domains to pre-train on."""

TARGET = Line(
    "shop-garden", "GA", 700, 240, 1.0,
    ("planter", "birdhouse", "trellis", "vase", "bench", "feeder", "chime", "basket"),
    ("Greenacre", "Wren", "Mossgate", "Larkspur", "Orchard"),
    ("the terrace", "a shady corner", "the rose bed", "the balcony", "the greenhouse"),
)  # fmt: skip
"""The smaller domain to fine-tune on."""

LINES = (*SOURCES, TARGET)

OPENINGS = (
    "A {made} {kind} of {stuff}.",
    "{Stuff}, {made} for {place}.",
    "{Made} {stuff} through and through.",
    "{Stuff} outside, {made} inside.",
    "This {stuff} {kind} has {made} edges.",
    "By hand: first {made}, then joined with {stuff}.",
)
MIDDLES = (
    "The {made} {stuff} stays {feel}.",
    "{Stuff} this {made} is {feel}.",
    "{Made} parts, {stuff} heart.",
    "Every {made} piece of {stuff} is {feel}.",
    "{Stuff} that lasts, {made} with care.",
    "Both {made} and {finished}, all {stuff}.",
)
CLOSINGS = (
    "",
    "For {place}.",
    "A gift for {people}.",
    "For {people}.",
)
FEELS = ("sturdy", "light", "quiet", "simple", "handsome", "cheerful", "slender", "modest")
PEOPLE = ("neighbours", "grandparents", "hosts", "collectors", "beginners")


@dataclass(frozen=True)
class Goods:
    """The items of one domain; every array has one entry an item."""

    line: Line
    raw_ids: tuple[str, ...]
    colours: np.ndarray
    """int64, index into `COLOUR_NAMES`."""
    patterns: np.ndarray
    """int64, index into `PATTERNS`."""
    materials: np.ndarray
    """int64, index into `MATERIAL_NAMES`."""
    kinds: np.ndarray
    """int64, index into `line.kinds`."""
    fame: np.ndarray
    """float64, how likely the item is bought among items that suit equally; long-tailed."""
    titles: tuple[str, ...]
    brands: tuple[str, ...]
    descriptions: tuple[str | None, ...]
    pictured: np.ndarray
    """bool, whether the item has a picture."""


def draw_goods(line: Line, rng: np.random.Generator) -> Goods:
    """Draw the items of one domain; colours, materials and patterns each come about equally often."""
    n = line.n_items

    def spread(size: int) -> np.ndarray:
        return rng.permutation(np.arange(n) % size)

    themes = spread(N_COLOURS * N_MATERIALS)
    kinds = spread(len(line.kinds))
    materials = themes // N_COLOURS
    described = rng.random(n) >= 0.03
    texts = [_describe(line, int(kinds[i]), int(materials[i]), rng) for i in range(n)]
    return Goods(
        line=line,
        raw_ids=tuple(f"{line.code}{number:04d}" for number in rng.permutation(n)),
        colours=themes % N_COLOURS,
        patterns=spread(N_PATTERNS),
        materials=materials,
        kinds=kinds,
        fame=np.exp(rng.normal(0.0, 0.8, n)),
        titles=tuple(title for title, _ in texts),
        brands=tuple(line.brands[int(rng.integers(len(line.brands)))] for _ in range(n)),
        descriptions=tuple(text if kept else None for (_, text), kept in zip(texts, described, strict=True)),
        pictured=rng.random(n) >= 0.04,
    )


def _describe(line: Line, kind: int, material: int, rng: np.random.Generator) -> tuple[str, str]:
    """A title and two or three sentences, with the kind and, again and again, the material's words."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(rng.integers(len(choices)))]

    nouns, adjectives = MATERIALS[MATERIAL_NAMES[material]]
    stuff = pick(nouns)
    made, finished = (adjectives[int(i)] for i in rng.permutation(len(adjectives))[:2])
    text = " ".join((pick(OPENINGS), pick(MIDDLES), pick(CLOSINGS))).format(
        kind=line.kinds[kind], stuff=stuff, made=made, finished=finished, Stuff=stuff.title(), Made=made.title(),
        feel=pick(FEELS), place=pick(line.places), people=pick(PEOPLE),
    )  # fmt: skip
    return f"{made.title()} {stuff} {line.kinds[kind]}", text.strip()
