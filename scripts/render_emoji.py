"""Render the emoji sheet that ships with the package, from the system's Noto Color Emoji font.

    python scripts/render_emoji.py --out src/ditkit/assets/emoji

Needs the font (Debian: fonts-noto-color-emoji), Pillow with Raqm (Debian: libfribidi0) and, for the list of
sequences and their names, `pip install emoji fonttools`. None of them is needed to use the package: the
sheet (one lossless WebP, 64 x 64 a picture) and the captions are in assets/.

Captions are lower-cased Unicode names. A single code point has its formal name ("red apple"), a skin-tone
sequence that name and the tone ("thumbs up sign: medium skin tone"), any other sequence its CLDR short name
("woman astronaut"), flags "flag of" and the CLDR territory. Sequences that the font does not shape into one
glyph are left out, and so is a picture that is pixel for pixel one already there.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from pathlib import Path

import emoji
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

GLYPH = (136, 128)  # the bitmap strike at size 109
SQUARE = 136
COLUMNS = 64
VARIATION_SELECTOR = "\ufe0f"
JOINER = "\u200d"
TONES = {
    chr(0x1F3FB + i): f"{name} skin tone"
    for i, name in enumerate(("light", "medium-light", "medium", "medium-dark", "dark"))
}


def caption(sequence: str) -> tuple[str, str]:
    """(caption, group) of an emoji; group is one of single, tone, flag, keycap, joined."""
    bare = sequence.replace(VARIATION_SELECTOR, "")
    short = emoji.EMOJI_DATA[sequence]["en"].strip(":").replace("_", " ").lower()
    if len(bare) == 1:
        return unicodedata.name(bare, short).lower(), "single"
    if all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in bare) or any(ord(c) >= 0xE0000 for c in bare):
        return f"flag of {short}", "flag"
    if len(bare) == 2 and bare[1] in TONES:
        return f"{unicodedata.name(bare[0], short.split(chr(58))[0]).lower()}: {TONES[bare[1]]}", "tone"
    if bare.endswith("\u20e3"):
        return short, "keycap"
    short = (
        short.replace("(", "")
        .replace(")", "")
        .replace("\u2019", "'")
        .replace("\u201c", "")
        .replace("\u201d", "")
    )
    return short, "tone" if any(tone in bare for tone in TONES) else "joined"


def render(sequence: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """The glyph box centred on a white square, scaled to `size` with antialiasing."""
    square = Image.new("RGB", (SQUARE, SQUARE), "white")
    ImageDraw.Draw(square).text(
        (0, (SQUARE - GLYPH[1]) // 2), sequence, font=font, embedded_color=True, anchor="lt"
    )
    return square.resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    font = ImageFont.truetype(arguments.font, 109, layout_engine=ImageFont.Layout.RAQM)
    covered = set(TTFont(arguments.font).getBestCmap())
    one_glyph = font.getlength("\U0001f34e")
    rows, pictures, seen_pictures, seen_captions = [], [], set(), set()
    for sequence, facts in sorted(emoji.EMOJI_DATA.items()):
        if facts["status"] > emoji.STATUS["fully_qualified"] or font.getlength(sequence) != one_glyph:
            continue
        if not all(ord(c) in covered or c in (VARIATION_SELECTOR, JOINER) for c in sequence):
            continue
        name, group = caption(sequence)
        picture = render(sequence, font, arguments.size)
        if picture.tobytes() in seen_pictures or name in seen_captions:
            continue
        seen_pictures.add(picture.tobytes())
        seen_captions.add(name)
        rows.append({"emoji": sequence, "caption": name, "group": group})
        pictures.append(np.asarray(picture))

    height = -(-len(pictures) // COLUMNS)
    sheet = np.full((height * arguments.size, COLUMNS * arguments.size, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = divmod(index, COLUMNS)
        sheet[
            y * arguments.size : (y + 1) * arguments.size, x * arguments.size : (x + 1) * arguments.size
        ] = picture
    arguments.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(arguments.out / "sheet.webp", lossless=True, quality=100, method=6)
    facts = {"size": arguments.size, "columns": COLUMNS, "font": "Noto Color Emoji", "pictures": rows}
    (arguments.out / "captions.json").write_text(json.dumps(facts, ensure_ascii=False, indent=0) + "\n")
    groups = {g: sum(r["group"] == g for r in rows) for g in ("single", "tone", "flag", "keycap", "joined")}
    print(f"{len(rows)} pictures: {groups}")


if __name__ == "__main__":
    main()
