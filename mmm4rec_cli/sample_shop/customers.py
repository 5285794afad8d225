"""Who buys in the sample shop: users whose next choice follows what they saw, read and when they last came.

The rule is the same in every domain. An item has a theme: its colour (to see) and its material (to read about). Users
furnish: the next purchase has the next colour of one cycle and the next material of another. Such purchases follow
one another within days. Now and then a user comes back after weeks for a one-off, any famous item, and then goes on
from the purchase before it: so the gap before a purchase tells whether it counts. Among items of the theme sought,
fame and the user's favourite pattern decide.
"""

from dataclasses import dataclass

import numpy as np

from mmm4rec_cli.sample_shop.goods import N_COLOURS, N_MATERIALS, N_PATTERNS, Goods

FEWEST, MOST = 5, 25
"""Interactions of a user."""
BEGIN = 1_577_836_800
"""2020-01-01 in Unix seconds; first purchases fall into the year after it, histories into about two."""
HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Rule:
    """How themes follow one another: drawn once a shop, shared by its domains.

    `next_colour[c]` and `next_material[m]` are single cycles through all colours and all materials.
    """

    next_colour: np.ndarray
    next_material: np.ndarray
    one_off: float = 0.2
    """Share of purchases that follow no rule; they come after weeks, all others within days."""
    favourite: float = 4.0
    """How much likelier an item of the favourite pattern is."""


def draw_rule(rng: np.random.Generator) -> Rule:
    """Draw the two cycles."""
    return Rule(next_colour=_cycle(N_COLOURS, rng), next_material=_cycle(N_MATERIALS, rng))


def _cycle(size: int, rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(size)
    following = np.empty(size, dtype=np.int64)
    following[order] = np.roll(order, -1)
    return following


@dataclass(frozen=True)
class Purchases:
    """All interactions of one domain, in order of user, then time; every array has one entry an interaction."""

    users: np.ndarray
    """int64, 0…"""
    items: np.ndarray
    """int64, index into the domain's goods."""
    timestamps: np.ndarray
    """int64, Unix seconds."""


def simulate(goods: Goods, rule: Rule, rng: np.random.Generator) -> Purchases:
    """Let every user of a domain shop."""
    n_users = goods.line.n_users
    extra = rng.geometric(1 / (1 + goods.line.mean_extra), n_users) - 1
    lengths = np.minimum(FEWEST + extra, MOST)
    favourites = rng.integers(N_PATTERNS, size=n_users)
    chances = _chances(goods, rule)

    users = np.repeat(np.arange(n_users), lengths)
    items = np.empty(len(users), dtype=np.int64)
    stamps = np.empty(len(users), dtype=np.int64)
    place = 0
    for user in range(n_users):
        time = BEGIN + rng.uniform(0, 365 * DAY)
        anchor = -1
        for step in range(lengths[user]):
            one_off = step > 0 and rng.random() < rule.one_off
            if anchor < 0 or one_off:
                row = chances[-1]
            else:
                colour = int(rule.next_colour[goods.colours[anchor]])
                material = int(rule.next_material[goods.materials[anchor]])
                row = chances[(colour * N_MATERIALS + material) * N_PATTERNS + int(favourites[user])]
            item = int(np.searchsorted(row, rng.random(), side="right"))
            if not one_off:
                anchor = item
            if step:
                time += np.exp(rng.normal(np.log(60 * DAY), 0.4) if one_off else rng.normal(np.log(10 * HOUR), 0.8))
            items[place], stamps[place] = item, int(time)
            place += 1
    return Purchases(users=users, items=items, timestamps=stamps)


def _chances(goods: Goods, rule: Rule) -> np.ndarray:
    """Cumulative chances [themes * patterns + 1, items], float64; the last row is fame alone."""
    rows = []
    for colour in range(N_COLOURS):
        for material in range(N_MATERIALS):
            suits = (goods.colours == colour) & (goods.materials == material)
            for pattern in range(N_PATTERNS):
                liked = np.where(goods.patterns == pattern, rule.favourite, 1.0)
                rows.append(goods.fame * suits * liked)
    rows.append(goods.fame)
    table = np.cumsum(np.stack(rows), axis=1)
    return np.asarray(table / table[:, -1:])
