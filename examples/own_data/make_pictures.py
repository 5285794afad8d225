"""Draw the tea shop's pictures (they are not stored): python examples/own_data/make_pictures.py."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"green": "#6a9a4b", "black": "#4a2f27", "white": "#e8e2cf", "herbal": "#b5566b"}
HERE = Path(__file__).parent


def main(folder: Path = HERE) -> None:
    """Draw one picture for every product that names one, below `folder`."""
    for line in (HERE / "products.jsonl").read_text(encoding="utf-8").splitlines():
        product = json.loads(line)
        if product["image"] is None:
            continue
        kind, _, form = product["title"].lower().split()
        picture = Image.new("RGB", (64, 64), "#f4f1ea")
        draw = ImageDraw.Draw(picture)
        if form == "tin":
            draw.rectangle((16, 10, 48, 56), fill=COLOURS[kind])
        elif form == "bags":
            draw.polygon([(32, 8), (54, 54), (10, 54)], fill=COLOURS[kind])
        else:
            for x in range(12, 52, 8):
                draw.ellipse((x, 20 + x % 16, x + 10, 44 + x % 16), fill=COLOURS[kind])
        path = folder / product["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


if __name__ == "__main__":
    main()
