"""Numbers → Exhibits: pictures, with what to look for in them. They are drawn to be read on a page
5 inches wide, a telephone's too, in colours that colour-blind readers tell apart: viridis from low
to high, berlin around 0, lines and tints by Okabe and Ito.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mostgan.figures import correlations, relative_maps
from mostgan.figures.page import Exhibit, table

rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.6})
WIDTH = 4.8  # inches
LINES = ("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("#CC79A7", "-.")
TINT, OPACITY = np.array(to_rgb("#E69F00")), 0.8  # where a style acts most
LOSSES = ["loss_G", "loss_D"], ["D_real", "D_fake"], ["r1"], ["diversity"], ["ada_p"]  # panels
SCORES = ["fvd16", "fvd128", "fvd128_every8", "fid"]
OTHERS = ["spectrum_distance_db"], ["static_rate", "real_static_rate"]


def canvas(height, dpi=200):
    return Figure(figsize=(WIDTH, height), dpi=dpi, layout="constrained")


def pixels(figure):
    """uint8 [H, W, 3]"""
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return np.asarray(drawn.buffer_rgba())[..., :3].copy()


def similarity(clips):
    """Figure 5. clips: what was Seen in each of several, a list of layers."""
    first = {layers[0].block: layers for layers in reversed(list(zip(*clips)))}  # of each block
    figure, told, tables = canvas(1 + WIDTH / len(first)), [], []
    axes = figure.subplots(1, len(first), sharey=True, squeeze=False)[0]
    for ax, (block, layers) in zip(axes, sorted(first.items())):
        name = f"{block}² {layers[0].conv}"
        matrix = torch.cat([layer.cosines for layer in layers]).mean(dim=0).numpy()
        K, others = len(matrix), matrix[~np.eye(len(matrix), dtype=bool)]
        image = ax.imshow(matrix, cmap="berlin", vmin=-1, vmax=1)
        ax.set(title=name, xlabel="motion style")
        ax.locator_params(integer=True)
        tables.append(table(f"mean cosine of styles, {name}", range(K), range(K), matrix))
        told.append(f"{others.mean():.2f} at {name} ({others.min():.2f} to {others.max():.2f})")
    figure.colorbar(image, ax=axes, location="bottom", aspect=40, label="mean cosine")
    words = f"""Look off the diagonal: dark squares are styles at right angles to one another,
        which change the weights in different ways; pink ones would be styles that do the same. The
        mean cosine of two styles is {", ".join(told)}. Computed between the
        modulations M (Eq. 1) of two styles, as vectors of I·3·3 numbers, in the first convolution
        with motion styles of each block; mean over {len(clips)} clips."""
    return Exhibit(
        "figure-5", "Figure 5: how alike the motion styles are", words, tables, pixels(figure)
    )


def attention(layers, seconds):
    """Figure 6. layers: what was Seen in a clip, which takes so many seconds."""
    names = [f"{layer.block}² {layer.conv}" for layer in layers]
    means = torch.stack([layer.attention.mean(dim=1) for layer in layers])  # [layers, T, K]
    K, figure = means.shape[2], canvas(1.2 + 1.05 * len(layers))
    axes = figure.subplots(len(layers), 4, sharex=True, sharey=True, squeeze=False)
    place = {"extent": (0, seconds, K - 0.5, -0.5), "aspect": "auto", "interpolation": "nearest"}
    for row, name, mean, layer in zip(axes, names, means, layers):
        # At least to twice the equal attention, so that this is no bright colour.
        row[0].imshow(mean.t().numpy(), vmin=0, vmax=max(2 / K, float(means.max())), **place)
        row[0].set(title=f"{name}: mean", ylabel="style", yticks=range(0, K, -(-K // 4)))
        order = layer.attention.std(dim=0).sum(dim=1).argsort(descending=True).tolist()
        for ax, o in zip(row[1:], (order[0], order[len(order) // 2], order[-1])):
            ax.imshow(layer.attention[:, o].t().numpy(), vmin=0, vmax=1, **place)
            ax.set(title=f"filter {o}")
    for ax in axes[-1]:
        ax.set(xlabel="time (s)")
        ax.locator_params("x", nbins=3)
    for which, label in ((axes[:, :1], "mean attention"), (axes[:, 1:], "attention of a filter")):
        figure.colorbar(which[0, 0].images[0], ax=which, location="bottom", label=label)
    words = f"""Look along a row: where the colour changes, filters turn to that style, or away
        from it, as the clip goes on. Equal attention would be {1 / K:.3f}; a style with far more
        is the one that the layer has settled on. Computed as the softmax A of the scores (Eq. 2)
        in one clip. Left: the mean over all filters; then, in a scale of their own, the filters
        whose attention changes most, as the median does, and least."""
    tables = [
        table("mean over filters and time, of each style", range(K), names, means.mean(dim=1)),
        table("its standard deviation over time", range(K), names, means.std(dim=1)),
    ]
    return Exhibit("figure-6", "Figure 6: attention over time", words, tables, pixels(figure))


def overlay(frames, relative):
    """Frames in grey, tinted the more the nearer a style is to where and when it acts most.

    frames: uint8 [T, 3, H, W]; relative: [T, K, h, w] up to 1 → uint8 [T, K, H, W, 3].
    """
    grey = frames.numpy().mean(axis=1)[:, None, :, :, None] / 255
    enlarged = F.interpolate(relative.clamp(min=0), size=frames.shape[2:], mode="bilinear")
    mixed = grey + (TINT - grey) * enlarged.numpy()[..., None] * OPACITY
    return (mixed * 255).round().astype(np.uint8)


def sheet(tiles, across, titles=(), beside=(), dpi=200):
    """Tiles in rows of so many, with names → uint8 [T, height, width, 3].

    tiles: uint8 [T, n, H, W, 3]; titles: of the first tiles; beside: names of the rows.
    """
    rows = -(-tiles.shape[1] // across)
    named = rows if len(titles) > across else 1
    figure = canvas((WIDTH - 0.7 * bool(beside)) / across * rows + 0.3 * named, dpi)
    figure.set_layout_engine("compressed", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    axes = figure.subplots(rows, across, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, title in zip(axes.flat, titles):
        ax.set_title(title, pad=2)
    for ax, name in zip(axes[:, 0], beside):
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    images = [ax.imshow(tile, interpolation="bicubic") for ax, tile in zip(axes.flat, tiles[0])]
    agg, frames = FigureCanvasAgg(figure), []
    agg.draw()  # all once, and from then on the tiles alone
    for frame in tiles:
        for image, tile in zip(images, frame):
            image.set_data(tile)
            image.axes.draw_artist(image)
        frames.append(np.asarray(agg.buffer_rgba())[..., :3].copy())
    return np.stack(frames)


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
    picture = sheet(of_styles, 5, [f"{i * second:.2f} s" for i in chosen], names)[0]
    video = sheet(tiles, int(np.ceil(np.sqrt(K + 1))), names, dpi=100)
    words = f"""Look for styles whose orange lies in different places and moves with what moves
        there: there, filters that attend to it are active. A grey style acts less than the average;
        if one is orange everywhere, attention has settled on it. Tints go from the mean of the
        styles, grey, to the most that a style does, which stands beside it: they say where, not how
        much, and nothing where that is near 0. Computed as Σ A[o,κ] |x[o]| / Σ |x[o]| over the
        channels o of the block's last convolution ({layer.conv}; x are its features), less the mean
        over the styles κ, in parts of the style's largest value in the clip, enlarged."""
    values = zip(layer.maps.mean(dim=(0, 2, 3)), layer.maps.std(dim=(0, 2, 3)), largest)
    tables = [table("of each style", ("mean", "std", "largest"), range(K), values)]
    title = f"Figure 7: where each style acts, block {block}²"
    return Exhibit(f"figure-7-{block}", title, words, tables, picture, video)


def content_against_motion(clips, second):
    """Figure 8. clips: uint8 [motions, contents, T, 3, H, W], frames so many seconds apart."""
    (M, C, T), values = clips.shape[:3], correlations(clips)
    tiles = clips.permute(2, 0, 1, 4, 5, 3).numpy()  # [T, M, C, H, W, 3]
    motions, contents = [f"motion {m}" for m in range(M)], [f"content {c}" for c in range(C)]
    chosen = np.linspace(0, T - 1, 3).astype(int)
    of_motions = tiles[chosen].swapaxes(0, 1).reshape(1, -1, *tiles.shape[3:])
    beside = [f"{motion}\n{i * second:.2f} s" for motion in motions for i in chosen]
    picture = sheet(of_motions, C, contents, beside)[0]
    video = sheet(tiles.reshape(T, M * C, *tiles.shape[3:]), C, contents, motions, dpi=100)
    words = f"""Look down a column: the same thing should be shown throughout. Look along a row:
        different things should move alike, at the same times and in the same directions. The looks
        of two clips of one content correlate by {values[0, 0]:.2f}, of clips that share nothing by
        {values[0, 1]:.2f}; the changes of two clips of one motion by {values[1, 0]:.2f}, of clips
        that share nothing by {values[1, 1]:.2f}. Looks are a clip's mean over time, in grey, and
        changes what is left without it; both less their mean over all clips."""
    return Exhibit("figure-8", "Figure 8: content against motion", words, [], picture, video)


def course(curves):
    """Losses, scores and ADA's p over a run. curves: of `curves`."""
    panels = [*LOSSES, SCORES, [f"proxy_{name}" for name in SCORES], *OTHERS]
    panels = [there for names in panels if (there := [name for name in names if name in curves])]
    figure = canvas(0.4 + 1.2 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, names in zip(axes, panels):
        for (color, dashes), name in zip(LINES, names):
            ax.plot(*curves[name], dashes, color=color, lw=1, label=name, marker="o", ms=1.5)
        ax.grid(axis="y", lw=0.4)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, frameon=False)
    axes[-1].set_xlabel("frames (thousands)")
    words = """Look at the discriminator's outputs: if those of real and of generated clips
        draw apart without end, it wins, and ADA's p should rise. The scores say whether clips get
        better. Computed by train.py: means between two lines of stats.jsonl. Proxy scores are of a
        random network, and good only for comparing runs with one another."""
    ends = [curves[name][1, [0, -1]] for names in panels for name in names]
    tables = [table("of the run", ("first", "last"), sum(panels, []), ends)]
    return Exhibit("curves", "The run: losses, scores and ADA's p", words, tables, pixels(figure))
