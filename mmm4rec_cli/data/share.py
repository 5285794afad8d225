"""The published processed data: a figshare share page resolved to the addresses of its files.

A private link shows its article's number on its page; figshare's public API lists the article's files. Where the API
does not answer for a private link, the article is taken as the one zip archive that figshare makes of it.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from mmm4rec_cli.data.fetch import Fetcher, Refused, Unavailable

SHARE = "f7603ea556c23c2aef88"
"""The private link of the paper's processed data."""

PAGE = "https://figshare.com/s/{share}"
API = "https://api.figshare.com/v2/articles/{article}/files?private_link={share}&page_size=1000"
WHOLE = "https://ndownloader.figshare.com/articles/{article}?private_link={share}"

_ARTICLE = re.compile(r"""articles/(?:[^\s"'<>/]+/){0,2}([0-9]{5,})|article_?[iI]d["']?\s*[:=]\s*["']?([0-9]{5,})""")


@dataclass(frozen=True)
class SharedFile:
    """A file behind a share page; size and md5 where its listing names them."""

    name: str
    url: str
    size: int | None
    md5: str | None


async def shared_files(fetcher: Fetcher, share: str = SHARE) -> list[SharedFile]:
    """The files behind a share page.

    Raises:
        Unavailable: the page could not be had or names no article.
    """
    page = PAGE.format(share=share)
    try:
        address, text = await fetcher.text(page)
    except Refused as error:
        raise Unavailable([f"{page}: {error}"]) from error
    found = _ARTICLE.search(address) or _ARTICLE.search(text)
    if found is None:
        raise Unavailable([f"{page}: the page names no article (figshare shows some pages to browsers only)"])
    article = found[1] or found[2]
    try:
        _, listing = await fetcher.text(API.format(article=article, share=share))
        files = _listed(json.loads(listing), share)
    except (Refused, ValueError):
        files = []
    return files or [SharedFile(f"{share}.zip", WHOLE.format(article=article, share=share), None, None)]


def _listed(listing: Any, share: str) -> list[SharedFile]:
    """What the API's listing names, as far as it can be fetched; ValueError if it is none."""
    if not isinstance(listing, list):
        raise ValueError("no list of files")
    files = []
    for entry in listing:
        if not isinstance(entry, dict) or entry.get("is_link_only"):
            continue
        name, url, size = entry.get("name"), entry.get("download_url"), entry.get("size")
        md5 = entry.get("computed_md5") or entry.get("supplied_md5")
        # The name becomes a file's in the workspace: nothing in it may lead elsewhere.
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_. -]*", name) and isinstance(url, str)):
            continue
        joint = "&" if "?" in url else "?"
        url = url if "private_link=" in url else f"{url}{joint}private_link={share}"
        size = size if isinstance(size, int) and size > 0 else None
        files.append(SharedFile(name, url, size, md5 if isinstance(md5, str) and md5 else None))
    return files
