"""Figures on one HTML page that needs nothing else: no network, no script, no file beside it."""

import base64
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from mostgan.video import VideoWriter, write_png


class Exhibit(NamedTuple):
    """A figure with what belongs to it."""

    name: str  # of its files
    title: str
    words: str  # what to look for, and how it was computed
    tables: list[str]  # its numbers, of `table`
    picture: np.ndarray  # uint8 [H, W, 3]
    video: np.ndarray | None = None  # uint8 [T, H, W, 3]


STYLE = """
:root { color-scheme: light dark; overflow-wrap: anywhere }
body { margin: auto; padding: 1rem; max-width: 75rem; font: 1rem/1.5 system-ui, sans-serif }
figure { display: flex; flex-wrap: wrap; gap: 0 2rem; margin: 0 0 3rem }
figure > * { flex: 1 1 20rem; min-width: 0 }
img { display: block; width: 100%; margin-bottom: 1rem }
pre { overflow-x: auto; font-size: .8rem }
"""


def page(title, about, sections):
    """The HTML page. about: text; sections: of `section`."""
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
{"".join(sections)}
</html>
"""


def section(exhibit, folder, fps):
    """Writes an exhibit's pictures into a folder, as PNG and WebP. Returns its part of the page,
    which holds their bytes.
    """
    name, title, words, tables, picture, frames = exhibit
    files = {"Picture": folder / f"{name}.webp"}
    write_png(folder / f"{name}.png", picture)
    Image.fromarray(picture).save(files["Picture"], lossless=True, method=1)
    if frames is not None:
        files["Video"] = folder / f"{name}-video.webp"
        with VideoWriter(files["Video"], fps) as video:
            video.write(frames)
    images = ""
    for kind, file in files.items():
        data = base64.b64encode(file.read_bytes()).decode()
        images += f'\n<img alt="{kind} of {escape(title)}" src="data:image/webp;base64,{data}">'
    numbers = "".join(f"\n<pre>{escape(text)}</pre>" for text in tables)
    return f"""
<section id="{name}">
<h2>{escape(title)}</h2>
<figure>
<div>{images}</div>
<figcaption><p>{escape(words)}</p>{numbers}</figcaption>
</figure>
</section>
"""


def table(title, columns, names, values):
    """Numbers as text: a line of the title, one of the columns, one of each name and its values."""
    lines = [["", *map(str, columns)]]
    lines += [[str(name), *(f"{v:.3g}" for v in of)] for name, of in zip(names, values)]
    widths = [max(map(len, column)) + 2 for column in zip(*lines)]
    return "\n".join([title, *("".join(map(str.rjust, line, widths)) for line in lines)])
