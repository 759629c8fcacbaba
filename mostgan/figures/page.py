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
    words: list[str]  # what to look for, the most telling numbers, and how it was computed
    tables: dict[str, list[list[str]]]  # title → rows, the first of which is a header
    picture: np.ndarray  # uint8 [H, W, 3]
    video: np.ndarray | None = None  # uint8 [T, H, W, 3]


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #595959; --page: #fbfbf9; --rule: #ccc }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --soft: #a9a69f; --page: #16171a; --rule: #444 } }
body { margin: auto; padding: 1.5rem 1rem; max-width: 75rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.6rem } h2 { margin: 0 0 .75rem; font-size: 1.15rem }
p { margin: 0 0 .75rem } p + p, details + p, summary { color: var(--soft) }
section { margin-top: 2rem; padding-top: 1.5rem; border-top: 1px solid var(--rule) }
figure { display: grid; gap: 1rem 2rem; margin: 0; align-items: start;
  grid-template-columns: minmax(0, 1fr) }
img { display: block; width: 36rem; max-width: 100%; height: auto; margin-bottom: 1rem;
  background: #fff; border-radius: 4px }
div { overflow-x: auto }
table { margin: .75rem 0; border-collapse: collapse; font: .85rem/1.6 system-ui, sans-serif }
caption { text-align: left; font-weight: 600 }
th, td { padding: 0 1rem 0 0; text-align: right; white-space: nowrap; font-weight: normal;
  border-bottom: 1px solid var(--rule) }
th:first-child { text-align: left }
@media (min-width: 64rem) { figure { grid-template-columns: 36rem minmax(0, 1fr) }
  figcaption { position: sticky; top: 1.5rem } }
"""


def page(title, about, sections):
    """The HTML page. about: paragraphs of text; sections: of `section`."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{paragraphs(about)}</header>
<main>{"".join(sections)}</main>
</body>
</html>
"""


def section(exhibit, folder, fps):
    """Writes an exhibit's pictures into a folder, as PNG and WebP. Returns its part of the page,
    which holds their bytes.
    """
    name, title, words, tables, picture, frames = exhibit
    files = {"Picture": f"{name}.webp"}
    write_png(folder / f"{name}.png", picture)
    Image.fromarray(picture).save(folder / f"{name}.webp", lossless=True, method=1)
    if frames is not None:
        files["Video"] = f"{name}-video.webp"
        with VideoWriter(folder / files["Video"], fps) as video:
            video.write(frames)
    shown = [image(folder / file, f"{kind}. {title}. {words[1]}") for kind, file in files.items()]
    return f"""
<section id="{name}">
<h2>{escape(title)}</h2>
<figure>
<div>{"".join(shown)}</div>
<figcaption>{paragraphs(words)}
<details><summary>All numbers</summary>{"".join(table(*of) for of in tables.items())}</details>
<p>Files: {name}.png, {", ".join(files.values())}</p></figcaption>
</figure>
</section>"""


def image(path, alt):
    """With its size, so that no text moves while it loads."""
    with Image.open(path) as opened:
        size = 'width="{}" height="{}"'.format(*opened.size)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'\n<img src="data:image/webp;base64,{data}" {size} alt="{text(alt)}">'


def paragraphs(texts):
    return "".join(f"\n<p>{text(words)}</p>" for words in texts)


def text(words):
    """HTML of plain text, whose line breaks go."""
    return escape(" ".join(words.split()))


def table(title, rows):
    lines = []
    for i, (name, *values) in enumerate(rows):
        tag, scope = ("td", "row") if i else ("th", "col")
        cells = "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)
        lines.append(f'\n<tr><th scope="{scope}">{escape(name)}</th>{cells}</tr>')
    body = f"<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody>"
    return f"\n<div><table><caption>{escape(title)}</caption>{body}</table></div>"
