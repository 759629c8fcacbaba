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

from mostgan.figures import correlations, relative_maps
from mostgan.figures.page import Exhibit

rcParams.update({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.linewidth": 0.6})
rcParams.update({"xtick.labelsize": 8, "ytick.labelsize": 8})
WIDTH = 4.8  # inches
STILL, MOVING = 200, 100  # dots per inch of pictures and of videos
LINES = ("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("#CC79A7", "-.")
TINT, OPACITY = np.array(colors.to_rgb("#E69F00")), 0.8  # where a style acts most
DISTANCES = "fvd16", "fvd128", "fvd128_every8", "fid"
PANELS = {  # title → names in stats.jsonl
    "loss": ("loss_G", "loss_D"),
    "output of the discriminator": ("D_real", "D_fake"),
    "R1 penalty": ("r1",),
    "diversity loss": ("diversity",),
    "ADA's p (probability)": ("ada_p",),
    "Fréchet distance": (*DISTANCES, *(f"proxy_{name}" for name in DISTANCES)),
    "temporal spectrum distance (dB)": ("spectrum_distance_db",),
    "share of static clips": ("static_rate", "real_static_rate"),
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
        row[0].imshow(mean.t().numpy(), vmin=0, vmax=float(means.max()), cmap="viridis", **place)
        row[0].set(title=f"{name}: mean", ylabel="style", yticks=range(0, K, -(-K // 4)))
        order = layer.attention.std(dim=0).sum(dim=1).argsort(descending=True).tolist()
        for ax, o in zip(row[1:], (order[0], order[len(order) // 2], order[-1])):
            ax.imshow(layer.attention[:, o].t().numpy(), vmin=0, vmax=1, cmap="viridis", **place)
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
    """Frames in grey, tinted the more the nearer a style is to where and when it acts most.

    frames: uint8 [T, 3, H, W]; relative: [T, K, h, w] up to 1 → uint8 [T, K, H, W, 3].
    """
    grey = frames.numpy().mean(axis=1)[:, None, :, :, None] / 255
    enlarged = F.interpolate(relative.clamp(min=0), size=frames.shape[2:], mode="bilinear")
    mixed = grey + (TINT - grey) * enlarged.numpy()[..., None] * OPACITY
    return (mixed * 255).round().astype(np.uint8)


def sheet(tiles, across, beside=(), above=(), inside=(), tinted=False, dpi=STILL):
    """Tiles in rows of so many, with names → uint8 [T, height, width, 3].

    tiles: uint8 [T, n, H, W, 3]; beside: names of the rows; above: of the columns; inside: of the
    tiles; tinted: whether the scale of `overlay` is drawn below.
    """
    gaps = (0, 0), (0, -tiles.shape[1] % across), (0, 2), (0, 2), (0, 0)
    tiles = np.pad(tiles, gaps, constant_values=255)
    T, n, H, W, _ = tiles.shape
    R, left, below = n // across, 0.7 * bool(beside), 0.45 * tinted
    mosaics = tiles.reshape(T, R, across, H, W, 3).swapaxes(2, 3).reshape(T, R * H, across * W, 3)
    side = (WIDTH - left) / across * R
    height = 0.25 * bool(above) + side + below
    figure = Figure(figsize=(WIDTH, height), dpi=dpi)
    ax = figure.add_axes((left / WIDTH, below / height, 1 - left / WIDTH, side / height))
    ax.xaxis.tick_top()
    ax.set_xticks(np.arange(len(above)) + 0.5, above)
    ax.set_yticks(np.arange(len(beside)) + 0.5, beside)
    ax.tick_params(length=0, pad=3, labelsize=9)
    ax.spines[:].set_visible(False)
    for i, name in enumerate(inside):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        ax.text(i % across + 0.04, i // across + 0.05, name, va="top", fontsize=8, bbox=box)
    if tinted:
        tints = colors.LinearSegmentedColormap.from_list(
            "", [[0.5] * 3, 0.5 + (TINT - 0.5) * OPACITY]
        )
        bar = figure.add_axes((0.3, 0.27 / height, 0.4, 0.09 / height))
        figure.colorbar(ScalarMappable(cmap=tints), cax=bar, orientation="horizontal")
        bar.set_xticks([0, 1], ["mean of styles, or less", "the style's most"])
    # What is drawn over black, and over white, tells how any mosaic shows through.
    image = ax.imshow(np.zeros((1, 1, 3)), extent=(0, across, R, 0), aspect="auto")
    black = pixels(figure)
    image.set_data(np.ones((1, 1, 3)))
    opening = (pixels(figure).astype(np.float32) - black) / 255
    x, bottom, right, top = ax.get_window_extent().extents.round().astype(int)
    place = slice(len(black) - top, len(black) - bottom), slice(x, right)
    frames = np.repeat(black[None], T, axis=0)
    for frame, mosaic in zip(frames, mosaics):
        shown = Image.fromarray(mosaic).resize((right - x, top - bottom), Image.Resampling.BICUBIC)
        frame[place] = (black[place] + opening[place] * shown).round()
    return frames


def where_styles_act(frames, layer, second):
    """Figure 7 of the block whose last convolution is the Seen layer. frames: uint8 [T, 3, H, W],
    so many seconds apart.
    """
    relative, largest = relative_maps(layer.maps)
    T, K, block = *layer.maps.shape[:2], layer.block
    tiles = frames.permute(0, 2, 3, 1).numpy()[:, None], overlay(frames, relative)
    tiles = np.concatenate(tiles, axis=1)  # [T, 1 + K, H, W, 3]
    names = ["frame", *(f"style {k}\n{most:+.3f}" for k, most in enumerate(largest))]
    chosen = np.linspace(0, T - 1, 5).astype(int)
    of_styles = tiles[chosen].swapaxes(0, 1).reshape(1, -1, *tiles.shape[2:])
    picture = sheet(of_styles, 5, names, [f"{i * second:.2f} s" for i in chosen], tinted=True)[0]
    video = sheet(tiles, int(np.ceil(np.sqrt(K + 1))), inside=names, tinted=True, dpi=MOVING)
    by_style = layer.maps.swapaxes(0, 1).flatten(1)  # [K, T·H·W]
    mean, std = by_style.mean(dim=1), by_style.std(dim=1)
    most = int(std.argmax())
    look = """Look for styles whose orange lies in different places and moves with what moves there:
        there, filters that attend to it are active. A grey style acts less than the average."""
    told = f"""Equal attention would be {1 / K:.3f}. Style {most} differs most between places and
        times: {mean[most]:.3f} ± {std[most]:.3f} (standard deviation)."""
    how = f"""Computed as Σ A[o,κ] |x[o]| / Σ |x[o]| over the channels o of the block's last
        convolution ({layer.conv}; x are its features), less the mean over the styles κ, in parts of
        the style's largest value in the clip (beside it), enlarged to the frame."""
    columns = "mean", "standard deviation", "lowest", "highest", "highest less the mean of styles"
    values = torch.stack([mean, std, by_style.amin(dim=1), by_style.amax(dim=1), largest], dim=1)
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
    panels = {title: [n for n in names if n in curves] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = canvas(0.4 + 1.2 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, names) in zip(axes, panels.items()):
        for (color, dashes), name in zip(LINES * 2, names):
            marker = "o" if curves[name].shape[1] < 12 else None
            ax.plot(*curves[name], dashes, color=color, lw=1.2, label=name, marker=marker, ms=3)
        ax.set_title(title, loc="left")
        if title.startswith("share"):
            ax.set_ylim(-0.02, 1.02)
        ax.grid(axis="y", lw=0.4, color="#dddddd")
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            place = {"loc": "lower right", "bbox_to_anchor": (1, 0.98), "borderaxespad": 0}
            ax.legend(**place, ncols=2, frameon=False, handlelength=1.5, columnspacing=1)
    axes[-1].set_xlabel("frames (thousands)")
    drawn = {name: curves[name][1] for names in panels.values() for name in names}
    values = [[y[0], np.fmin.reduce(y), np.fmax.reduce(y), y[-1]] for y in drawn.values()]
    look = """Look at the discriminator's outputs: if those of real and of generated clips draw
        apart without end, it wins, and ADA's p should rise. The scores say whether clips get
        better."""
    last = ", ".join(f"{name} {y[-1]:.3g}" for name, y in drawn.items())
    told = f"At {curves['frames'][0, -1]:.4g} thousand frames: {last}."
    how = """Computed by train.py: means between two lines of stats.jsonl. Proxy scores are of a
        random network, and good only for comparing runs with one another."""
    tables = {"Over the run": rows("", ("first", "lowest", "highest", "last"), drawn, values)}
    title = "The run: losses, scores and ADA's p"
    return Exhibit("curves", title, [look, told, how], tables, pixels(figure))
