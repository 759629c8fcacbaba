"""The figures: their numbers computed a second way, pictures of what is known, the page, errors."""

import base64
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import MODEL
from PIL import Image
from safetensors.torch import save_file

import mostgan
from kernels import reference
from mostgan import checkpoint, figures
from mostgan.figures import __main__ as program
from mostgan.figures import drawing
from mostgan.figures.page import Exhibit, page, section
from mostgan.motion import content_latent, motion_noise
from mostgan.progress import read_stats

CONFIG = dataclasses.replace(MODEL, motion_styles=3, motion_resolutions=(16, 32), rank=2)
T, K = 5, 3


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return mostgan.Generator(dataclasses.replace(CONFIG, motion_distance=4)).eval()


@pytest.fixture(scope="module")
def watched(generator):
    return [figures.watch(generator, seed, T) for seed in (3, 4)]


def layer_of(generator, seen):
    return getattr(getattr(generator.synthesis, f"b{seen.block}"), seen.conv)


@torch.no_grad()
def second_way(generator, seed, layer):
    """Content weight [1, O, I, 3, 3] and motion style [T, K, R, I + 6] of a layer, not rendered."""
    w = generator.mapping(content_latent([seed], CONFIG.z_dim))
    t = torch.arange(T, dtype=torch.float64)[None]
    _, vectors = generator.motion(w, t, *motion_noise([seed], t, generator.config))
    weight = layer.weight * layer.affine(w)[0][:, None, None]
    return weight[None], layer.hypernetwork(vectors).view(T, K, CONFIG.rank, -1)


def cosines(motion_style):
    """Cosines [T, K, K] by reference.mostatt: with styles as content weights, its scores are their
    products.
    """
    I = motion_style.shape[3] - 6
    a, b, c = motion_style.double().split([I, 3, 3], dim=3)
    M = torch.einsum("tkri,tkry,tkrx->tkiyx", a, b, c) / math.sqrt(CONFIG.rank)
    _, products = reference.mostatt(M, motion_style.double())
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    return products / lengths[:, :, None] / lengths[:, None]


def numbers(text, columns=K):
    """The numbers of a table, whose lines end in so many."""
    return np.array([line.split()[-columns:] for line in text.splitlines()[2:]], float)


def test_a_watched_clip_is_the_rendered_one(generator, watched):
    frames, layers = watched[0]
    rendered = next(iter(mostgan.render(generator, 3, 0, T)))[0]  # in other windows
    assert (frames.int() - rendered.int()).abs().max() <= 1
    named = [(seen.block, seen.conv) for seen in layers]
    assert named == [(16, "conv0"), (16, "conv1"), (32, "conv0"), (32, "conv1")]
    assert not any(layer_of(generator, seen)._forward_hooks for seen in layers)


def test_nothing_watches_on_after_an_error(generator):
    def fail(module, inputs):
        raise RuntimeError("in a frame")

    hook = generator.synthesis.b32.conv1.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in a frame"):
        figures.watch(generator, 3, 2)
    hook.remove()
    convs = [conv for of_block, _ in generator.synthesis.layers() for conv in of_block]
    assert not any(conv._forward_hooks for conv in convs)


def test_what_is_noted_is_in_the_order_of_time(generator, watched):
    frames, layers = figures.watch(generator, 3, 3, step=2)
    assert torch.equal(frames, watched[0][0][::2])
    for seen, expected in zip(layers, watched[0][1]):
        torch.testing.assert_close(seen.attention, expected.attention[::2], atol=1e-6, rtol=0)
        torch.testing.assert_close(seen.maps, expected.maps[::2], atol=1e-6, rtol=0)


def test_figure_5_is_what_mostatt_scores(generator, watched):
    exhibit = drawing.similarity([layers for _, layers in watched])
    for text, name, i in zip(exhibit.tables, ("16² conv0", "32² conv0"), (0, 2)):
        assert name in text.splitlines()[0]
        layer = layer_of(generator, watched[0][1][i])
        expected = [cosines(second_way(generator, seed, layer)[1]) for seed in (3, 4)]
        for (_, layers), of_clip in zip(watched, expected):
            torch.testing.assert_close(layers[i].cosines.double(), of_clip, atol=1e-5, rtol=0)
        mean = torch.cat(expected).mean(dim=0).numpy()
        np.testing.assert_allclose(numbers(text), mean, atol=6e-4)
        others = mean[~np.eye(K, dtype=bool)]
        assert f"({others.min():.2f} to {others.max():.2f})" in exhibit.words


def test_figure_6_is_the_softmax_of_mostatts_scores(generator, watched):
    layers = watched[0][1]
    means = []
    for seen in layers:
        _, score = reference.mostatt(*second_way(generator, 3, layer_of(generator, seen)))
        attention = score.softmax(dim=2)
        torch.testing.assert_close(seen.attention, attention, atol=1e-5, rtol=0)
        means.append(attention.mean(dim=1).numpy())
    mean, deviation = map(numbers, drawing.attention(layers, 0.2).tables)
    np.testing.assert_allclose(mean, np.mean(means, axis=1), atol=6e-4)
    np.testing.assert_allclose(deviation, np.std(means, axis=1, ddof=1), atol=6e-4)


def test_figure_7_takes_the_features_of_the_layer(generator):
    features = []
    hook = generator.synthesis.b32.conv1.register_forward_hook(
        lambda layer, inputs, outputs: features.append(outputs[0])
    )
    seen = figures.watch(generator, 3, T)[1][-1]
    hook.remove()
    size = torch.cat(features).abs().numpy()
    A, maps = seen.attention.numpy(), seen.maps.numpy()
    assert maps.shape == (T, K, 32, 32)
    np.testing.assert_allclose(maps.sum(axis=1), 1, atol=1e-5)
    for t, k, y, x in [(0, 0, 0, 0), (2, 1, 7, 30), (4, 2, 31, 16)]:
        wanted = (A[t, :, k] * size[t, :, y, x]).sum() / size[t, :, y, x].sum()
        assert maps[t, k, y, x] == pytest.approx(wanted, abs=1e-5)


def test_figure_7_of_a_style_that_acts_on_the_left():
    """Filters 0 and 1 attend to style 1 and are active on the left; 2 and 3 to style 0, on the
    right.
    """
    attention = torch.tensor([[0.0, 1, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]]).expand(T, 4, K)
    features = torch.zeros(T, 4, 8, 8)
    features[:, :2, :, :4], features[:, 2:, :, 4:] = -3, 5
    maps = figures.style_maps(attention, features)
    assert (maps[:, 1, :, :4] == 1).all() and (maps[:, 1, :, 4:] == 0).all()
    assert torch.equal(maps[:, 0], maps[:, 1].flip(2)) and (maps[:, 2] == 0).all()
    relative, largest = figures.relative_maps(maps)
    torch.testing.assert_close(largest, torch.tensor([2 / 3, 2 / 3, -1 / 3]))
    torch.testing.assert_close(relative[:, 1, :, :4], torch.ones(T, 8, 4))

    frames = torch.full((T, 3, 16, 16), 100, dtype=torch.uint8)
    tinted = drawing.overlay(frames, relative)  # [T, K, 16, 16, 3]
    is_grey = (tinted == 100).all(axis=4)
    assert is_grey[:, 1, :, 9:].all() and not is_grey[:, 1, :, :7].any()
    assert is_grey[:, 0, :, :7].all() and is_grey[:, 2].all()
    assert (tinted[:, 1, :, :7, 0] > tinted[:, 1, :, :7, 2] + 100).all()  # orange

    layer = figures.Seen(8, "conv1", attention, torch.ones(T, K, K), maps)
    exhibit = drawing.where_styles_act(frames, layer, 0.04)
    assert exhibit.video.shape[0] == T and exhibit.picture.ndim == 3
    mean, std, most = numbers(exhibit.tables[0], 3).T
    np.testing.assert_allclose([mean[1], std[1], most[1]], [0.5, 0.5, 2 / 3], atol=1e-2)


def test_figure_8_tells_content_from_motion():
    """Every content has a pattern of its own that stands, and every motion one that flickers."""
    rng = np.random.default_rng(0)
    content = rng.integers(0, 100, (4, 1, 3, 8, 8))
    motion = rng.integers(0, 100, (3, 1, 1, 3, 8, 8)) * np.array([0, 1, 0, 1])[:, None, None, None]
    clips = torch.from_numpy((content + motion).astype(np.uint8))
    (looks, looks_apart), (moves, moves_apart) = figures.correlations(clips)
    assert looks > 0.5 > 0 > looks_apart
    assert moves == pytest.approx(1, abs=1e-3) and moves_apart < 0
    exhibit = drawing.content_against_motion(clips, 0.04)
    assert f"correlate by {looks:.2f}" in exhibit.words and len(exhibit.video) == 4


def test_figure_8_has_a_content_in_each_column_and_a_motion_in_each_row(generator, monkeypatch):
    given = []
    monkeypatch.setattr(
        drawing, "content_against_motion", lambda clips, second: given.append(clips)
    )
    shown = {"step": 1, "label": None}
    list(program.exhibits(generator, program.Path("nowhere"), 5, T, 25, shown))
    for m, c in ((0, 0), (2, 1), (1, 3)):
        clip = next(iter(mostgan.render(generator, 5 + c, 0, T, motion_seed=5 + m)))
        assert (given[0][m, c].int() - clip[0].int()).abs().max() <= 1


def test_tiles_lie_where_they_belong():
    shades = np.arange(12, dtype=np.uint8).reshape(2, 6) * 20
    tiles = np.broadcast_to(shades[:, :, None, None, None], (2, 6, 8, 8, 3))
    pictures = drawing.sheet(tiles, 3)
    height, width = pictures.shape[1:3]
    middles = pictures[:, [height // 3, height * 2 // 3]][:, :, width // 6 :: width // 3, 0]
    assert np.abs(middles[:, :, :3].reshape(2, 6).astype(int) - shades).max() <= 1
    named = drawing.sheet(tiles[:1], 3, ["a", "b", "c"], ["one", "two"])
    assert named.shape[1] > named.shape[2] * 0.6 and (named[0, :20, :20] == 255).all()


def test_curves_are_those_of_the_run(tmp_path):
    lines = [{"frames": 1000 * i, "loss_G": i / 2, "D_real": None, "ada_p": 0.1} for i in (1, 2)]
    lines[1]["proxy_fvd16"] = 30.0
    lines += [{"frames": 2500, "loss_G": [1]}, {"loss_G": 1}, 7]  # of no run
    text = "\n".join(map(json.dumps, lines)) + '\n{"frames": 3000, "lo'
    (tmp_path / "stats.jsonl").write_text(text)
    curves = figures.curves(read_stats(tmp_path))
    np.testing.assert_array_equal(curves["loss_G"], [[1, 2], [0.5, 1]])
    np.testing.assert_array_equal(curves["proxy_fvd16"], [[2], [30]])
    assert np.isnan(curves["D_real"][1]).all()
    exhibit = drawing.course(curves)
    assert exhibit.picture.std() > 10
    np.testing.assert_allclose(
        numbers(exhibit.tables[0], 2), [[0.5, 1], [np.nan] * 2, [0.1] * 2, [30] * 2]
    )


# ----------------------------------------------------------------------------------------- the page


class Reader(HTMLParser):
    """The tags of a page, [(name, attributes)]; fails where one is not closed in its turn."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def run(tmp_path, generator):
    """A function: a run folder with a checkpoint of a generator, and statistics if wanted."""

    def make(generator=generator, stats=True):
        folder = tmp_path / "run"
        folder.mkdir()
        state = generator.state_dict()
        checkpoint.save(folder, 12, generator.config, state, {"x": torch.zeros(1)}, {})
        if stats:
            line = {"frames": 120, "loss_G": 1.0, "loss_D": 0.5, "ada_p": 0.0}
            (folder / "stats.jsonl").write_text(json.dumps(line) + "\n")
        return folder

    return make


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, words)])
    program.main()


def test_the_page_needs_nothing_else(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, run(), "--frames", T)
    folder = tmp_path / "figures" / "run"
    html = (folder / "index.html").read_text()
    reader = Reader(html)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reader.all(
        "meta"
    )
    assert not any(word in html for word in ("http", "<script", "url(", "@import", "<link", "href"))
    names = ["figure-5", "figure-6", "figure-7-16", "figure-7-32", "figure-8", "curves"]
    assert [attributes["id"] for attributes in reader.all("section")] == names
    assert len(reader.all("figure")) == len(reader.all("figcaption")) == len(names)
    pictures = reader.all("img")
    moving = 0
    for attributes in pictures:
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/webp;base64" and len(attributes["alt"]) > 20
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            moving += image.n_frames == T
    assert len(pictures) == 9 and moving == 3
    for name in names:
        still, lossless = (np.asarray(Image.open(folder / f"{name}.{s}")) for s in ("png", "webp"))
        assert np.array_equal(still, lossless) and len(np.unique(still)) > 10
    assert len(list(folder.iterdir())) == 1 + 2 * 6 + 3
    assert "checkpoint-000012" in reader.text and "Equal attention would be 0.333" in reader.text


LOOK = """<!DOCTYPE html><meta charset="utf-8"><body>
FRAMES
<script>
const said = [];
addEventListener("load", () => setTimeout(() => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, images = [...page.images];
    const loaded = images.filter(image => image.naturalWidth > 100).length;
    said.push([page.documentElement.scrollWidth, images.length, loaded].join(" "));
  }
  document.body.textContent = said.join("; ");
}, 500));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_page_on_a_telephone_and_on_a_desk(run, tmp_path, monkeypatch):
    """Every picture loads, and nothing is wider than the window."""
    command(monkeypatch, run(), "--frames", T, "--out", tmp_path / "out")
    html = escape((tmp_path / "out" / "index.html").read_text())
    frames = (f'<iframe width="{width}" srcdoc="{html}"></iframe>' for width in (400, 1400))
    (tmp_path / "look.html").write_text(LOOK.replace("FRAMES", "".join(frames)))
    words = (
        "chromium --headless=new --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom"
    )
    done = subprocess.run(
        [*words.split(), f"--user-data-dir={tmp_path / 'profile'}", tmp_path / "look.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    widths, counts, loaded = zip(*re.findall(r"(\d+) (\d+) (\d+)", done.stdout.split("<body>")[1]))
    assert len(widths) == 2 and int(widths[0]) <= 400 < 1000 < int(widths[1]) <= 1400
    assert counts == loaded == ("9", "9")


def test_without_styles_and_statistics_there_is_what_exists(run, tmp_path, monkeypatch):
    plain = mostgan.Generator(dataclasses.replace(MODEL, motion_styles=0)).eval()
    path = run(plain, stats=False) / "checkpoint-000012"
    command(monkeypatch, path, "--frames", "2", "--out", tmp_path / "new" / "out")
    reader = Reader((tmp_path / "new" / "out" / "index.html").read_text())
    assert [attributes["id"] for attributes in reader.all("section")] == ["figure-8"]
    assert "figures 5, 6" in reader.text and "without stats.jsonl" in reader.text


def test_figures_of_a_model_with_conditions_are_of_those_of_a_clip_in_a_file(
    run, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(CONFIG, num_labels=1, frame_condition_dim=2)
    torch.manual_seed(0)
    generator = mostgan.Generator(config).eval()
    path, file = run(generator), tmp_path / "words.safetensors"
    rows = torch.randn(T, 2)
    save_file({"a": torch.ones(1), "a/frames": rows, "b/frames": -rows}, file)
    of_clip = {"label": [1.0], "frame_condition": rows}
    frames, layers = figures.watch(generator, 3, T, **of_clip)
    rendered = next(iter(mostgan.render(generator, 3, 0, T, **of_clip)))[0]
    assert (frames.int() - rendered.int()).abs().max() <= 1
    other = figures.watch(generator, 3, T, label=[1.0], frame_condition=-rows)[1]
    assert not torch.allclose(layers[0].attention, other[0].attention, atol=1e-3)

    watched = []
    whole = program.watch
    monkeypatch.setattr(program, "watch", lambda *a, **o: watched.append(o) or whole(*a, **o))
    command(monkeypatch, path, "--frames", 2, "--out", tmp_path / "out", "--condition", f"{file}:a")
    assert all(torch.equal(options["frame_condition"], rows) for options in watched)
    assert (tmp_path / "out" / "figure-5.png").exists()
    for words, error in (
        (["--condition", f"{file}:b"], "the model is conditional"),
        (["--condition", str(file)], f"has 2 clips; give one, such as {file}:a"),
        (["--condition", "1"], "2 numbers at every frame"),
        (["--label", "0"], "2 numbers at every frame"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, path, "--out", tmp_path / "new", *words)
        told = capsys.readouterr().err
        assert error in told and told.count("\n") == 1 and not (tmp_path / "new").exists()


def test_text_is_no_markup(tmp_path):
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    exhibit = Exhibit("a", "<b>", 'x < y, "a & b"', ["<i> &"], picture)
    reader = Reader(page("<u>", "</p>", [section(exhibit, tmp_path, 25)]))
    assert not {"b", "i", "u"} & {tag for tag, _ in reader.tags} and "x < y" in reader.text
    assert reader.all("img")[0]["alt"] == "Picture of <b>"


BAD = {
    "--frames 1": "frames is 1",
    "--speed 0": "a step of no time",
    "--label 1": "trained without labels",
    "--out here": "remove it, or choose another --out",
}


@pytest.mark.parametrize("words, error", BAD.items(), ids=BAD)
def test_errors_are_one_line_and_leave_all_as_it_was(
    run, tmp_path, monkeypatch, capsys, words, error
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    path = run()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, path, *words.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and error in told and told.count("\n") == 1
    # The folder that figures of all runs go into may have been made.
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != "figures"] == before


def test_without_matplotlib_it_says_how_to_get_it(run, monkeypatch, capsys):
    monkeypatch.setattr("mostgan.program.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, run())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "mostgan[figures]" in told
