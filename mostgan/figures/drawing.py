"""Numbers → Exhibits: pictures, with what to look for in them. They are drawn to be read on a page
5 inches wide, a telephone's too.

Colour maps are perceptually uniform, and all colours are told apart by colour-blind readers:
viridis from low to high, berlin around 0, lines and tints by Okabe and Ito.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colors, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

from mostgan import metrics
from mostgan.figures import correlations, relative_maps
from mostgan.figures.page import Exhibit

rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.linewidth": 0.6})
rcParams.update({"xtick.labelsize": 8, "ytick.labelsize": 8})
WIDTH = 4.8  # inches
STILL, MOVING = 200, 100  # dots per inch of pictures and of videos
LINES = ("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("#CC79A7", "-.")
LESS, SAME, MORE = (np.array(colors.to_rgb(c)) for c in ("#56B4E9", "#808080", "#E69F00"))
OPACITY = 0.8  # of the strongest tint
# What stats.jsonl has → the panel, and the curve in it …
NAMES = {
    "loss_G": ("loss", "generator"),
    "loss_D": ("loss", "discriminator"),
    "D_real": ("output of the discriminator", "real clips"),
    "D_fake": ("output of the discriminator", "generated clips"),
    "r1": ("R1 penalty", "R1 penalty"),
    "diversity": ("diversity loss", "diversity loss"),
    "ada_p": ("ADA's p (probability)", "ADA's p"),
}
# … and the panels of scores that are no Fréchet distances.
UNITS = {
    "spectrum_distance_db": "temporal spectrum distance (dB)",
    "static_rate": "share of static clips",
    "real_static_rate": "share of static clips",
}


def canvas(height, dpi=STILL):
    return Figure(figsize=(WIDTH, height), dpi=dpi, layout="constrained")


def pixels(figure):
    """uint8 [H, W, 3]"""
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return np.asarray(drawn.buffer_rgba())[..., :3].copy()


def rows(corner, columns, names, values):
    """A table's rows of text, the first being its header."""
    body = [[str(name), *(f"{v:.3f}" for v in of)] for name, of in zip(names, values)]
    return [[corner, *map(str, columns)], *body]


def similarity(clips):
    """Figure 5. clips: what was Seen in each of several, a list of layers."""
    first = {layers[0].block: layers for layers in reversed(list(zip(*clips)))}  # of each block
    figure = canvas(0.75 + 2.2 * -(-len(first) // 2))
    axes = figure.subplots(-(-len(first) // 2), 2, squeeze=False).reshape(-1)
    axes[-1].set_axis_off()
    numbers, tables = [], {}
    for ax, (block, layers) in zip(axes, sorted(first.items())):
        name = f"{block}² {layers[0].conv}"
        matrix = torch.cat([layer.cosines for layer in layers]).mean(dim=0).numpy()
        K, others = len(matrix), matrix[~np.eye(len(matrix), dtype=bool)]
        ticks = range(0, K, -(-K // 10))
        ax.set_axis_on()
        ax.set(title=name, xlabel="motion style", ylabel="motion style", xticks=ticks, yticks=ticks)
        image = ax.imshow(matrix, cmap="berlin", vmin=-1, vmax=1)
        tables[f"Mean cosine between styles, {name}"] = rows("style", range(K), range(K), matrix)
        if K > 1:
            numbers.append(
                f"{others.mean():.2f} at {name} ({others.min():.2f} to {others.max():.2f})"
            )
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30)
    bar.set_label("mean cosine between two styles")
    look = """Look off the diagonal: dark squares are styles at right angles to one another, which
        change the weights in different ways; light ones would be styles that do the same."""
    told = f"The mean cosine of two styles is {', '.join(numbers) or 'not there: K is 1'}."
    how = f"""Computed as the cosine between the modulations M (Eq. 1) of two styles, as vectors of
        I·3·3 numbers, in the first convolution with motion styles of each block, and averaged over
        all frames of {len(clips)} clips."""
    title = "Figure 5: how alike the motion styles are"
    return Exhibit("figure-5", title, [look, told, how], tables, pixels(figure))


def attention(layers, seconds):
    """Figure 6. layers: what was Seen in a clip, which takes so many seconds."""
    names = [f"{layer.block}² {layer.conv}" for layer in layers]
    means = torch.stack([layer.attention.mean(dim=1) for layer in layers])  # [layers, T, K]
    K, low, high = means.shape[2], means.amin(dim=1), means.amax(dim=1)
    figure = canvas(1.2 + 1.05 * len(layers))
    options = {"sharex": True, "sharey": True, "squeeze": False, "width_ratios": [2, 1, 1, 1]}
    axes = figure.subplots(len(layers), 4, **options)
    place = {"extent": (0, seconds, K - 0.5, -0.5), "aspect": "auto", "interpolation": "nearest"}
    for row, name, mean, layer in zip(axes, names, means, layers):
        row[0].imshow(mean.t(), vmin=0, vmax=means.max(), cmap="viridis", **place)
        row[0].set(title=f"{name}: mean", ylabel="style", yticks=range(0, K, -(-K // 4)))
        order = layer.attention.std(dim=0).sum(dim=1).argsort(descending=True).tolist()
        for ax, o in zip(row[1:], (order[0], order[len(order) // 2], order[-1])):
            ax.imshow(layer.attention[:, o].t(), vmin=0, vmax=1, cmap="viridis", **place)
            ax.set(title=f"filter {o}")
    for which, label in ((axes[:, :1], "mean of filters"), (axes[:, 1:], "single filters")):
        for ax in which[-1]:
            ax.set(xlabel="time (s)")
        bar = figure.colorbar(which[0, 0].images[0], ax=which, location="bottom", aspect=25)
        bar.set_label(f"attention, {label}")
    layer, style = divmod(int((high - low).argmax()), K)
    look = """Look along a row: where the colour changes, filters turn to that style, or away from
        it, as the clip goes on."""
    told = f"""Equal attention would be {1 / K:.3f}. The mean over the filters moves most at
        {names[layer]} for style {style}, from {low[layer, style]:.3f} to
        {high[layer, style]:.3f}."""
    how = """Computed as the softmax A of the scores (Eq. 2) in every layer with motion styles, in
        one clip. Wide: the mean over all filters. Narrow: the three filters whose attention changes
        most, as the median does, and least."""
    of_time = ("Lowest", low), ("Mean", means.mean(dim=1)), ("Highest", high)
    tables = {
        f"{which} in time of the mean over filters": rows("layer", range(K), names, values)
        for which, values in of_time
    }
    title = "Figure 6: attention over time"
    return Exhibit("figure-6", title, [look, told, how], tables, pixels(figure))


def overlay(frames, relative):
    """Frames in grey, with orange where a style acts more than the mean of all, blue where less;
    the stronger, the more opaque.

    frames: uint8 [T, 3, H, W]; relative: [T, K, h, w] in −1 … 1 → uint8 [T, K, H, W, 3].
    """
    grey = frames.numpy().mean(axis=1)[:, None, :, :, None] / 255
    enlarged = F.interpolate(relative, size=frames.shape[2:], mode="bilinear").numpy()[..., None]
    mixed = grey + (np.where(enlarged > 0, MORE, LESS) - grey) * np.abs(enlarged) * OPACITY
    return (mixed * 255).round().astype(np.uint8)


def sheet(tiles, across, beside=(), above=(), inside=(), tints=False, dpi=STILL):
    """Tiles in rows of so many, with names → uint8 [T, height, width, 3].

    tiles: uint8 [T, n, H, W, 3]; beside: names of the rows; above: of the columns; inside: of the
    tiles; tints: whether the scale of `overlay` is drawn below.
    """
    gap = (0, -tiles.shape[1] % across), (0, 2), (0, 2)
    tiles = np.pad(tiles, [(0, 0), *gap, (0, 0)], constant_values=255)
    T, n, H, W, _ = tiles.shape
    R = n // across
    mosaics = tiles.reshape(T, R, across, H, W, 3).swapaxes(2, 3).reshape(T, R * H, across * W, 3)
    left, top = 0.7 * bool(beside), 0.25 * bool(above)
    figure = canvas((WIDTH - left) * R / across + top + 0.6 * tints, dpi)
    ax = figure.subplots()
    ax.xaxis.tick_top()
    ax.set_xticks(np.arange(len(above)) + 0.5, above)
    ax.set_yticks(np.arange(len(beside)) + 0.5, beside)
    ax.tick_params(length=0, pad=2, labelsize=9)
    ax.spines[:].set_visible(False)
    for i, name in enumerate(inside):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        ax.text(i % across + 0.04, i // across + 0.05, name, va="top", fontsize=8, bbox=box)
    if tints:
        ends = [SAME + (end - SAME) * OPACITY for end in (LESS, SAME, MORE)]
        scale = colors.Normalize(-1, 1), colors.LinearSegmentedColormap.from_list("", ends)
        bar = figure.colorbar(
            ScalarMappable(*scale), ax=ax, location="bottom", shrink=0.6, aspect=30, pad=0.02
        )
        bar.set_ticks([-1, 0, 1], labels=["less", "as the mean of styles", "more"])
    # What is drawn over a black and over a white mosaic tells how any other one shows through.
    image = ax.imshow(np.zeros((1, 1, 3)), extent=(0, across, R, 0))
    black = pixels(figure)
    image.set_data(np.ones((1, 1, 3)))
    opening = (pixels(figure).astype(np.float32) - black) / 255
    x, bottom, right, y = ax.get_window_extent().extents.round().astype(int)
    place = slice(len(black) - y, len(black) - bottom), slice(x, right)
    out = np.repeat(black[None], T, axis=0)
    for frame, mosaic in zip(out, mosaics):
        shown = Image.fromarray(mosaic).resize((right - x, y - bottom), Image.Resampling.BICUBIC)
        frame[place] = (black[place] + opening[place] * shown).round()
    return out


def where_styles_act(frames, layer, second):
    """Figure 7 of the block whose last convolution is the Seen layer. frames: uint8 [T, 3, H, W],
    so many seconds apart.
    """
    relative, largest = relative_maps(layer.maps)
    T, K, block = *layer.maps.shape[:2], layer.block
    tiles = frames.permute(0, 2, 3, 1).numpy()[:, None], overlay(frames, relative)
    tiles = np.concatenate(tiles, axis=1)  # [T, 1 + K, H, W, 3]
    names = ["frame", *(f"style {k}\n±{most:.2f}" for k, most in enumerate(largest))]
    chosen = np.linspace(0, T - 1, 5).astype(int)
    of_styles = tiles[chosen].swapaxes(0, 1).reshape(1, -1, *tiles.shape[2:])
    picture = sheet(of_styles, 5, names, [f"{i * second:.2f} s" for i in chosen], tints=True)[0]
    video = sheet(tiles, int(np.ceil(np.sqrt(K + 1))), inside=names, tints=True, dpi=MOVING)
    of = {
        name: getattr(layer.maps, name)(dim=(0, 2, 3)) for name in ("mean", "std", "amin", "amax")
    }
    most = int(of["std"].argmax())
    look = """Look for styles whose orange lies in different places and moves with what moves there:
        there, filters that attend to the style are active; where it is blue, less than for the
        average style."""
    told = f"""Equal attention would be {1 / K:.3f}. Style {most} differs most between places and
        times: {of["mean"][most]:.3f} ± {of["std"][most]:.3f} (standard deviation)."""
    how = f"""Computed as Σ A[o,κ] |x[o]| / Σ |x[o]| over the channels o of the block's last
        convolution ({layer.conv}; x are its features), less the mean over the styles κ, in parts of
        the style's largest difference in the clip (± beside it), enlarged to the frame."""
    columns = "mean", "standard deviation", "lowest", "highest", "largest difference"
    values = torch.stack([*of.values(), largest], dim=1)
    tables = {"Attention over places and times": rows("style", columns, range(K), values)}
    title = f"Figure 7: where each style acts, block {block}²"
    return Exhibit(f"figure-7-{block}", title, [look, told, how], tables, picture, video)


def content_against_motion(clips, second):
    """Figure 8. clips: uint8 [motions, contents, T, 3, H, W], frames so many seconds apart."""
    (M, C, T), values = clips.shape[:3], correlations(clips)
    tiles = clips.permute(2, 0, 1, 4, 5, 3).numpy()  # [T, M, C, H, W, 3]
    motions, contents = [f"motion {m}" for m in range(M)], [f"content {c}" for c in range(C)]
    chosen = np.linspace(0, T - 1, 3).astype(int)
    of_motions = tiles[chosen].swapaxes(0, 1).reshape(1, -1, *tiles.shape[3:])
    beside = [f"{motion}\n{i * second:.2f} s" for motion in motions for i in chosen]
    picture = sheet(of_motions, C, beside, contents)[0]
    video = sheet(tiles.reshape(T, M * C, *tiles.shape[3:]), C, motions, contents, dpi=MOVING)
    look = """Look down a column: the same thing is shown throughout. Look along a row: different
        things move alike, at the same times and in the same directions."""
    told = f"""The looks of two clips of one content correlate by {values[0, 0]:.2f}, of clips that
        share nothing by {values[0, 2]:.2f}; the changes of two clips of one motion by
        {values[1, 1]:.2f}, of clips that share nothing by {values[1, 2]:.2f}."""
    how = f"""Rendered from {C} content latents × {M} draws of motion noise. Looks are a clip's mean
        over time, in grey, and changes what is left without it; both less their mean over all
        clips."""
    columns = "same content", "same motion", "nothing shared"
    tables = {"Mean correlation of two clips": rows("", columns, ("looks", "changes"), values)}
    title = "Figure 8: content against motion"
    return Exhibit("figure-8", title, [look, told, how], tables, picture, video)


def course(curves):
    """Losses, scores and ADA's p over a run. curves: of `read_curves`."""
    scores = [key for key in curves if key.removeprefix("proxy_") in metrics.LABELS]
    panel = {key: UNITS.get(key.removeprefix("proxy_"), "Fréchet distance") for key in scores}
    named = NAMES | {key: (panel[key], metrics.label(key).strip()) for key in scores}
    panels = {}
    for key, (title, name) in named.items():
        if key in curves:
            panels.setdefault(title, {})[name] = curves[key]
    figure = canvas(0.4 + 1.2 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, lines) in zip(axes, panels.items()):
        for (color, dashes), (name, (x, y)) in zip(LINES * 2, lines.items()):
            marker = "o" if len(x) < 12 else None
            ax.plot(x, y, dashes, color=color, lw=1.2, label=name, marker=marker, ms=3)
        ax.set_title(title, loc="left")
        ax.grid(axis="y", lw=0.4, color="#dddddd")
        ax.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            ax.legend(framealpha=0.7, edgecolor="none", borderpad=0.2)
    axes[-1].set_xlabel("frames (thousands)")
    ends = {name: y for lines in panels.values() for name, (_, y) in lines.items()}
    values = [[y[0], np.fmin.reduce(y), np.fmax.reduce(y), y[-1]] for y in ends.values()]
    look = """Look at the discriminator's outputs: if those of real and of generated clips draw
        apart without end, it wins, and ADA's p should rise. The scores say whether clips get
        better."""
    last = ", ".join(f"{name} {y[-1]:.3g}" for name, y in ends.items())
    told = f"At {curves['frames'][0, -1]:.4g} thousand frames: {last}."
    how = """Computed by train.py: means between two lines of stats.jsonl. Proxy scores are of a
        random network, and good only for comparing runs with one another."""
    tables = {"Over the run": rows("", ("first", "lowest", "highest", "last"), ends, values)}
    title = "The run: losses, scores and ADA's p"
    return Exhibit("curves", title, [look, told, how], tables, pixels(figure))
