"""The registry of domains: the Amazon Review 2018 categories, the mixes of them, and the names of a user's own."""

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.workspace import Workspace

CATEGORIES: Mapping[str, str] = MappingProxyType(
    {
        "appliances": "Appliances",
        "arts": "Arts_Crafts_and_Sewing",
        "automotive": "Automotive",
        "beauty": "All_Beauty",
        "books": "Books",
        "cds": "CDs_and_Vinyl",
        "clothing": "Clothing_Shoes_and_Jewelry",
        "electronics": "Electronics",
        "fashion": "AMAZON_FASHION",
        "food": "Grocery_and_Gourmet_Food",
        "games": "Video_Games",
        "garden": "Patio_Lawn_and_Garden",
        "giftcards": "Gift_Cards",
        "home": "Home_and_Kitchen",
        "instruments": "Musical_Instruments",
        "kindle": "Kindle_Store",
        "luxury": "Luxury_Beauty",
        "magazine": "Magazine_Subscriptions",
        "movies": "Movies_and_TV",
        "music": "Digital_Music",
        "office": "Office_Products",
        "pantry": "Prime_Pantry",
        "pets": "Pet_Supplies",
        "phones": "Cell_Phones_and_Accessories",
        "scientific": "Industrial_and_Scientific",
        "software": "Software",
        "sports": "Sports_and_Outdoors",
        "tools": "Tools_and_Home_Improvement",
        "toys": "Toys_and_Games",
    }
)
"""Short name -> category, as in the file names of Amazon Review 2018."""

MIXES: Mapping[str, tuple[str, ...]] = MappingProxyType({"fhckm": ("food", "home", "cds", "kindle", "movies")})
"""Mix -> its domains; users and items of a mix carry the prefix "<domain>-"."""

DOWNSTREAM: tuple[str, ...] = ("scientific", "pantry", "instruments", "arts", "office")
"""The domains of the paper's fine-tuning tables."""

_OWN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def is_registered(name: str) -> bool:
    """Whether `name` is a category's short name or a mix."""
    return name in CATEGORIES or name in MIXES


def category(domain: str) -> str:
    """The Amazon category of a short name; UsageError with close matches for any other name."""
    if domain not in CATEGORIES:
        raise unknown_domain(domain, CATEGORIES)
    return CATEGORIES[domain]


def mix(name: str) -> tuple[str, ...]:
    """The domains of a mix; UsageError for any other name."""
    if name not in MIXES:
        raise UsageError(f"unknown mix {name!r}", hint=f"mixes: {', '.join(sorted(MIXES))}")
    return MIXES[name]


def members(domain: str) -> tuple[str, ...]:
    """The categories' short names behind a registered name: a mix's domains, or the domain alone."""
    if domain in MIXES:
        return MIXES[domain]
    category(domain)
    return (domain,)


def own_domain(name: str) -> str:
    """Check the name of a user's own domain and give it back.

    Raises:
        UsageError: the name is not made of ASCII letters, digits, `-` and `_`, or starts with `-`.
    """
    if not _OWN_NAME.fullmatch(name):
        raise UsageError(
            f"domain name {name!r}: only letters, digits, - and _ are allowed, and no - at the start",
            hint="choose another --domain NAME",
        )
    return name


def own_domains(workspace: Workspace) -> list[str]:
    """The user's own domains that have tables in this workspace, sorted."""
    folder = workspace.processed("any").parent
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if (entry / "manifest.json").is_file())
    return sorted(name for name in names if not is_registered(name))


def check_domain(workspace: Workspace, name: str) -> str:
    """Give `name` back if it is a category, a mix or one of the workspace's own domains.

    Raises:
        UsageError: it is none of these; the hint names close matches.
    """
    own = own_domains(workspace)
    if is_registered(name) or name in own:
        return name
    raise unknown_domain(name, (*CATEGORIES, *MIXES, *own))


def unknown_domain(name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of `known`: close matches first, else all of them."""
    known = sorted(known)
    by_spelling = {short: short for short in known} | {
        full.lower(): short for short, full in CATEGORIES.items() if short in known
    }
    close = difflib.get_close_matches(name.lower(), by_spelling, n=3, cutoff=0.6)
    matches = list(dict.fromkeys(by_spelling[spelling] for spelling in close))
    hint = f"did you mean {' or '.join(matches)}?" if matches else f"known domains: {', '.join(known)}"
    return UsageError(f"unknown domain {name!r}", hint=hint)
