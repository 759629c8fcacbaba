"""Conditions of clips and frames (spec §13): from a file beside the clips through training to
samples.
"""

import dataclasses
import importlib
import itertools
import shlex

import av
import made_clips as made
import numpy as np
import pytest
import torch
import tyro
from conftest import CPU, MODEL, make_config, same_bits, tensors_of
from safetensors.numpy import save_file
from test_model import frames_of, make

import mostgan
import sample
import train as training
from mostgan import checkpoint, draws, prepare
from mostgan.checkpoint.export import export_file
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.data import Clips, batches
from mostgan.discriminator import Discriminator
from mostgan.metrics import open_detectors, sets
from mostgan.metrics.sets import GeneratedSet, Protocol
from mostgan.motion import condition_at, content_latent, motion_noise
from mostgan.prepare import data_sets
from mostgan.progress import Skips, Stats
from mostgan.rendering import to_uint8
from mostgan.run import with_data

ROWS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).numpy()


def counted(n, first=0):
    """Rows that tell their place: float32 [n, 2]."""
    k = np.arange(first, first + n)
    return np.stack([k, -k], axis=1).astype(np.float32)


# ------------------------------------------------------------------------------------ the networks


@torch.no_grad()
def test_motion_vectors_are_of_w_the_motion_code_and_the_condition():
    network = make(frame_condition_dim=3).motion_network
    w, code, e = torch.randn(2, 32), torch.randn(4, 32), torch.randn(4, 3)
    whole = torch.cat([w[[0, 0, 1, 1]], code, e], dim=1)
    assert torch.equal(network(w, code, e), network.fc1(network.fc0(whole)).view(4, 8, 16))


@torch.no_grad()
def test_a_frame_hears_of_its_own_condition_alone():
    generator = make(frame_condition_dim=3)
    t = torch.tensor([[0.0, 1.5, 7.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    e = torch.from_numpy(ROWS[:6]).view(2, 3, 3)
    frames = frames_of(generator, [1, 2], t, None, frame_condition=e)
    other = e.clone()
    other[1, 1] += 1
    changed = (frames_of(generator, [1, 2], t, None, frame_condition=other) - frames).abs()
    assert changed[4].max() > 1e-3 and changed[[0, 1, 2, 3, 5]].max() < 1e-6


@torch.no_grad()
def test_the_discriminator_sees_all_conditions_after_the_times():
    config = dataclasses.replace(MODEL, num_labels=2, frame_condition_dim=3)
    D = Discriminator(config)
    t, label, e = torch.tensor([[0.0, 3, 4]]), torch.randn(1, 2), torch.randn(1, 3, 3)
    seen = []
    D.time_condition.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    D.time_condition(t, label, e)
    assert torch.equal(seen[0][:2], label[0]) and torch.equal(seen[0][-9:], e.flatten())
    assert len(seen[0]) == 2 + 2 * (256 + 20) + 9
    frames = torch.randn(3, 3, 32, 32)
    assert not torch.equal(D(frames, t, label, e), D(frames, t, label, e.flip(1)))


@pytest.mark.parametrize(
    "changes, word",
    [({"motion_styles": 0}, "motion styles"), ({"frame_condition_dim": -1}, "0 or more")],
)
def test_impossible_models_are_named(changes, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(**{"frame_condition_dim": 2} | changes)


# ---------------------------------------------------------------------------------------- rendering


def test_a_condition_is_linear_between_frames_and_held_outside():
    rows = counted(5, 10)
    at = condition_at(rows, [-7, 0, 0.25, 3, 3.5, 4, 4.25, 1e8])
    assert at[:, 0].tolist() == [10, 10, 10.25, 13, 13.5, 14, 14, 14]
    assert condition_at(rows[:1], [0.5, 3]).tolist() == [[10, -10]] * 2


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 0.25, -2])
def test_render_is_the_forward_pass_with_interpolated_conditions(step):
    generator = make(frame_condition_dim=3)
    t = torch.arange(6, dtype=torch.float64) * step + 4
    e = torch.from_numpy(condition_at(ROWS, t))
    expected = to_uint8(frames_of(generator, [2], t[None], None, frame_condition=e[None]))
    options = dict(start=4, frames=6, step=step, frame_condition=ROWS)
    rendered = torch.cat(list(mostgan.render(generator, 2, **options)), dim=1)[0]
    assert (rendered.int() - expected.int()).abs().max() <= 1
    still = options | {"frame_condition": ROWS[4:5]}
    still = torch.cat(list(mostgan.render(generator, 2, **still)), dim=1)[0]
    assert (rendered.int() - still.int()).abs().max() > 5


def test_clips_of_a_rendering_have_rows_of_their_own():
    generator = make(frame_condition_dim=3)
    rows = [ROWS[:2], torch.from_numpy(ROWS[5:]).double()]
    options = dict(frames=4, frame_condition=rows)
    both = torch.cat(list(mostgan.render(generator, 1, clips=2, **options)), dim=1)
    for clip in range(2):
        options["frame_condition"] = rows[clip]
        alone = torch.cat(list(mostgan.render(generator, 1 + clip, **options)), dim=1)
        assert (alone[0].int() - both[clip].int()).abs().max() <= 1


def test_a_loop_goes_through_the_rows_once_and_has_no_seam():
    generator = make(frame_condition_dim=3)
    options = dict(loop=16, frame_condition=ROWS)
    twice = torch.cat(list(mostgan.render(generator, 1, frames=33, **options)), dim=1)[0].int()
    assert torch.equal(twice[:16], twice[16:32])
    steps = (twice[1:] - twice[:-1]).float().abs().mean(dim=(1, 2, 3))
    assert steps[15] < 1.5 * steps[:15].max()
    # 16 frames of the loop, 16 of the data's time (an anchor), 12 rows: frame 4 is at row 3.
    t = torch.tensor([[4.0]], dtype=torch.float64)
    noise, first = motion_noise([1], t, generator.config, loop=1)
    z, e = content_latent([1], 32), torch.from_numpy(ROWS[None, 3:4])
    at_4 = to_uint8(generator(z, t, noise, first, frame_condition=e))[0].int()
    assert (twice[4] - at_4).abs().max() <= 1


@pytest.mark.parametrize(
    "size, given, word",
    [
        (0, ROWS, "without frame conditions"),
        (3, None, "3 numbers at every frame"),
        (2, ROWS, r"shape \[12, 3\]"),
        (3, ROWS[0], r"shape \[3\]"),
        (3, ROWS[0, 0], r"shape \[\]"),
        (3, ROWS[:0], r"shape \[0, 3\]"),
        (3, ROWS * np.nan, "finite"),
        (3, [ROWS, ROWS], "each of 1 clips"),
    ],
)
def test_impossible_conditions_of_a_rendering_are_named(size, given, word):
    with pytest.raises(UserError, match=word):
        mostgan.render(make(frame_condition_dim=size), 0, frame_condition=given)


# ---------------------------------------------------------------------------------------- preparing


@pytest.fixture
def src(tmp_path):
    """A video of 40 frames and a folder of 7 pictures."""
    made.write_video(tmp_path / "src" / "film.mp4", made.numbered(40, 16, 16))
    made.write_pictures(tmp_path / "src" / "pictures", made.numbered(7, 16, 16))
    return tmp_path / "src"


ENTRIES = {
    "film": np.array([0.5, -1, 2], np.float32),
    "film/frames": counted(40).astype(np.float16),
    "pictures": np.array([1.0, 0, 0]),
    "pictures/frames": counted(7, 100),
}


def pack(src, entries, name="dst", **options):
    save_file(entries, src.parent / "c.safetensors")
    options |= {"conditions": src.parent / "c.safetensors"}
    return made.pack(src, src.parent / name, 16, **options)


@pytest.mark.parametrize(
    "options, film",
    [
        ({}, [np.arange(40)]),
        ({"fps": 12.5}, [np.arange(0, 40, 2)]),
        ({"clip_length": 16}, [np.arange(16), np.arange(16, 32), np.arange(32, 40)]),
        # The last frame of the film is on screen for two; what comes after it is held.
        (
            {"clip_length": 32, "fps": 50.0},
            [np.arange(32) / 2, np.arange(32, 64) / 2, np.minimum(np.arange(64, 80) / 2, 39)],
        ),
    ],
    ids=["whole", "resampled", "cut", "both"],
)
def test_clips_keep_their_conditions(src, options, film):
    _, clips = pack(src, ENTRIES, **options)
    expected = [*film, 100 + np.arange(7)]
    assert clips.lengths.tolist() == [len(k) for k in expected]
    assert (clips.num_labels, clips.frame_condition_dim) == (3, 2)
    for clip, k in enumerate(expected):
        own = ENTRIES["film" if clip < len(film) else "pictures"]
        assert np.array_equal(clips.condition(clip), own.astype(np.float32))
        rows = clips.frame_condition(clip, np.arange(len(k)))
        assert rows.dtype == np.float32 and np.array_equal(rows, np.stack([k, -k], axis=1))
    assert (
        clips.frame_condition(0, [-1, 0.5]).tolist()
        == condition_at(np.stack([film[0], -film[0]], axis=1), [0, 0.5]).tolist()
    )
    assert prepare.check(clips.path) == []


@pytest.mark.parametrize("leave", ["/frames", ""], ids=["clips alone", "frames alone"])
def test_either_kind_may_be_alone(src, leave):
    kept = {key: row for key, row in ENTRIES.items() if key.endswith("/frames") != bool(leave)}
    index, clips = pack(src, kept)
    assert (clips.num_labels, clips.frame_condition_dim) == ((3, 0) if leave else (0, 2))
    assert "per frame" in "\n".join(data_sets.summary(index)) or leave
    assert clips.condition(0).shape == (clips.num_labels,)
    assert clips.frame_condition(0, [0]).shape == (1, clips.frame_condition_dim)


def test_clips_without_a_condition_are_left_out_and_named(src):
    few = {key: row for key, row in ENTRIES.items() if key != "film/frames"}
    index, clips = pack(src, few | {"other": ENTRIES["film"]})
    assert clips.names == ["pictures"]
    assert made.notes_on(index, "left out", "film.mp4") and made.notes_on(index, "other", "match")


def changed(**entries):
    return ENTRIES | {key.replace("__", "/"): value for key, value in entries.items()}


BAD = {
    "no name fits": ({"else": ENTRIES["film"]}, "no entry for any of 2 clips"),
    "sizes": (changed(film=np.ones(2, np.float32)), "2 numbers"),
    "sizes of frames": (changed(film__frames=np.ones((40, 3), np.float32)), "3 numbers"),
    "shape": (changed(film=np.ones((40, 3), np.float32)), r"film has the shape \[40, 3\]"),
    "empty": (changed(film=np.ones(0, np.float32)), r"film has the shape \[0\]"),
    "NaN": (changed(pictures=np.array([1, np.nan, 0])), "pictures holds numbers .* not finite"),
    "too large": (changed(pictures=np.array([1, 1e300, 0])), "not finite"),
    "integers": (changed(film=np.arange(3)), "film is I64"),
    "one row less": (changed(film__frames=counted(39)), "39 rows, but film.mp4 has 40 frames"),
    "one row more": (changed(pictures__frames=counted(8)), "8 rows, but pictures has 7"),
    "nothing": ({}, "holds no conditions"),
    "a row for each frame, without its axis": (
        changed(film__frames=np.arange(40, dtype=np.float32)),
        r"vectors of .*NAME/frames \[n, E\]",
    ),
    "none has both": (
        {"film": ENTRIES["film"], "pictures/frames": ENTRIES["pictures/frames"]},
        "no clip has both",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_line(src, name):
    entries, word = BAD[name]
    with pytest.raises(UserError, match=word) as caught:
        pack(src, entries)
    assert "\n" not in str(caught.value) and "c.safetensors" in str(caught.value)


def test_the_number_of_rows_is_checked_in_films_that_are_cut_and_resampled(src):
    for options in ({"clip_length": 16}, {"clip_length": 16, "fps": 50.0}, {"fps": 2.0}):
        with pytest.raises(UserError, match="44 rows, but film.mp4 has 40"):
            pack(src, changed(film__frames=counted(44)), **options)


def test_a_film_that_is_cut_off_keeps_the_rows_of_what_is_left(src):
    """One film of many that was not downloaded to its end must not end the rest."""
    made.write_video(src / "film.mkv", made.numbered(40, 16, 16), options={"g": "1"})
    (src / "film.mp4").unlink()
    whole = (src / "film.mkv").read_bytes()
    (src / "film.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    index, clips = pack(src, ENTRIES)
    assert made.notes_on(index, "damaged", "film.mkv")
    length = clips.lengths[clips.names.index("film.mkv")]
    assert 10 < length < 40
    rows = clips.frame_condition(clips.names.index("film.mkv"), np.arange(length))
    assert np.array_equal(rows, counted(length))
    with pytest.raises(UserError, match="5 rows, but film.mkv has"):  # too few all the same
        pack(src, changed(film__frames=counted(5)), "other")
    # The break is in a last clip that is too short, and left out.
    each = (int(length) - 1) // 2
    _, clips = pack(src, ENTRIES, "cut", clip_length=each)
    assert clips.names[:2] == ["film.mkv#0", "film.mkv#1"]
    assert np.array_equal(clips.frame_condition(1, np.arange(each)), counted(each, each))


@pytest.mark.parametrize("clip_length", [None, 16])
@pytest.mark.parametrize("counts", ["from the start", "from what can be read"])
def test_a_film_that_is_damaged_at_its_beginning_keeps_the_rows_of_the_rest(
    src, clip_length, counts
):
    file = src / "film.mp4"
    made.write_video(file, made.numbered(40, 64, 64), options={"g": "10", "bf": "0"})
    with av.open(str(file)) as film:
        first = next(film.demux(video=0))
    data = bytearray(file.read_bytes())
    data[first.pos : first.pos + first.size] = bytes(first.size)
    file.write_bytes(data)
    rows = counted(40) if counts == "from the start" else counted(30, 10)
    _, clips = pack(src, changed(film__frames=rows), clip_length=clip_length)
    k = np.arange(min(30, clip_length or 30))
    shown = np.round((made.levels(clips, 0) - made.FIRST) / made.STEP)
    assert np.array_equal(shown, 10 + k)
    assert np.array_equal(clips.frame_condition(0, k), counted(len(k), 10))


def test_entries_of_both_kinds_may_be_spelled_differently(src):
    entries = {key.replace("film/", "FILM.mp4/"): rows for key, rows in ENTRIES.items()}
    _, clips = pack(src, entries)
    assert clips.names == ["film.mp4", "pictures"]
    assert np.array_equal(clips.frame_condition(0, [3]), counted(1, 3))


def test_names_that_differ_in_their_suffix_alone_find_their_clips(src):
    made.write_video(src / "film.mkv", made.numbered(40, 16, 16))
    _, clips = pack(src, {"film.mp4": np.ones(2), "film.mkv": np.zeros(2)})
    assert [clips.condition(i)[0] for i in range(2)] == [0, 1]  # film.mkv comes first
    with pytest.raises(UserError, match="several entries for film.mp4, which differ"):
        (src / "film.mkv").unlink()
        pack(src, {"film": np.ones(2), "film.MP4": np.zeros(2)}, "other")


def test_a_file_that_changes_while_films_are_packed(src, monkeypatch):
    """Clips of one and an index of the other must not be mixed."""
    packing = importlib.import_module("mostgan.prepare.pack")
    judge = packing._judge

    def replaced(*args):
        save_file(changed(film=ENTRIES["film"] + 1), src.parent / "c.safetensors")
        judge(*args)

    monkeypatch.setattr(packing, "_judge", replaced)
    with pytest.raises(UserError, match="c.safetensors has changed since packing began"):
        pack(src, ENTRIES)
    monkeypatch.undo()
    _, clips = pack(src, changed(film=ENTRIES["film"] + 1))
    assert clips.condition(0).tolist() == [1.5, 0, 3]


def test_what_is_no_file_of_conditions(src):
    (src.parent / "c.safetensors").write_text("film,1\n" * 9)
    for path in ("c.safetensors", "nothing", "src"):
        with pytest.raises(UserError, match="no safetensors file"):
            made.pack(src, src.parent / "dst", 16, conditions=src.parent / path)
    with pytest.raises(UserError, match="exclude each other"):
        made.pack(src, src.parent / "dst", 16, conditions="c.safetensors", labels="folders")


def test_other_conditions_are_another_data_set(src):
    """Not to be mixed up, though the clips are the same; a corrected file goes on with them."""
    one = pack(src, ENTRIES)[1]
    assert pack(src, ENTRIES)[1].fingerprint == one.fingerprint
    with pytest.raises(UserError, match="other settings"):
        pack(src, changed(film__frames=counted(40, 1)))
    with pytest.raises(UserError, match="39 rows"):
        pack(src, changed(film__frames=counted(39)), "other")
    before = {path: path.stat().st_ino for path in (src.parent / "other").glob("*-0*.safetensors")}
    other = pack(src, changed(film__frames=counted(40, 1)), "other")[1]
    assert len(before) == 2 and all(path.stat().st_ino == ino for path, ino in before.items())
    assert other.fingerprint != one.fingerprint


def test_a_damaged_file_of_frame_conditions_is_named(src):
    _, clips = pack(src, ENTRIES)
    file = clips.path / "frame_conditions.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-8], whole[4:], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="frame_conditions.safetensors is damaged"):
            clips.frame_condition(0, [0])
        assert any(file.name in line for line in prepare.check(clips.path))
    pack(src, ENTRIES)
    assert file.read_bytes() == whole and prepare.check(clips.path) == []
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        Clips(clips.path)


# ------------------------------------------------------------------------ training and what follows


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Clips of 20, 25 and 70 frames at 32², whose conditions tell clip (in hundreds) and frame."""
    folder, entries = tmp_path_factory.mktemp("conditions"), {}
    (folder / "src").mkdir()
    for clip, length in enumerate((20, 25, 70)):
        np.save(folder / "src" / f"{clip}.npy", made.moving(length, 32, 32, seed=clip))
        entries[f"{clip}"] = np.array([clip, 1.0], np.float32)
        entries[f"{clip}/frames"] = counted(length, 100 * clip)
    save_file(entries, folder / "c.safetensors")
    made.pack(folder / "src", folder / "dst", conditions=folder / "c.safetensors")
    return folder / "dst"


def config_of(packed, steps=1, **changes):
    return with_data(make_config(packed, steps, conditional=True, **changes), Clips(packed))


def test_the_data_decide_the_sizes(packed):
    assert config_of(packed).model.frame_condition_dim == 2
    assert config_of(packed).model.num_labels == 2
    plain = with_data(make_config(packed), Clips(packed))
    assert plain.model.frame_condition_dim == plain.model.num_labels == 0


def test_real_clips_come_with_the_conditions_of_their_frames(packed):
    """Of a clip that is longer than the model's times too, which count from a window's start."""
    clips = Clips(packed)
    for batch in itertools.islice(batches(clips, 6, 3, seed=0, max_num_frames=32), 8):
        k, clip = batch.frame_condition[..., 0], batch.label[:, :1]
        assert torch.equal(k, -batch.frame_condition[..., 1])
        offset = k - 100 * clip - batch.t
        assert torch.equal(offset, offset[:, :1].expand(-1, 3)) and offset.min() >= 0
        assert offset[clip[:, 0] < 2].abs().max() == 0
        assert (k - 100 * clip).max() < 70


def test_generated_clips_take_conditions_of_a_real_clip_at_their_times(packed):
    model = dataclasses.replace(MODEL, max_num_frames=32)
    config, clips, seen = config_of(packed, model=model), Clips(packed), set()
    windows = set()
    for seed in range(60):
        latents = draws.latents_of_piece(config, clips, CPU, np.random.default_rng(seed))
        clip = latents.label[:, :1]
        offset = latents.frame_condition[..., 0] - 100 * clip - latents.t
        assert (offset - offset[:, :1]).abs().max() < 1e-4
        assert (latents.frame_condition.sum(dim=2)).abs().max() < 1e-4
        lengths = torch.tensor(clips.lengths)[clip.long()].clamp(max=32)
        assert (latents.t < lengths).all()
        assert offset[clip[:, 0] < 2].abs().sum() < 1e-3
        windows |= set(offset[clip[:, 0] == 2, 0].round().tolist())
        seen |= set(clip[:, 0].tolist())
    assert seen == {0, 1, 2} and len(windows) > 5 and max(windows) <= 70 - 32


def test_pieces_carry_conditions_to_every_objective(packed, monkeypatch):
    """In the G step, the D step and R1, D is told conditions as they were drawn."""
    config, clips = config_of(packed), Clips(packed)
    state = training.new_state(config, CPU)
    seen = []
    condition = state.D.time_condition
    condition.register_forward_pre_hook(lambda module, args: seen.append(args))
    loop = training.steps(state, config, clips, CPU, Stats(packed, CPU), Skips())
    next(loop)
    loop.close()
    # Two pieces each of G, D (generated and real) and R1.
    assert len(seen) == 2 + 4 + 2
    for t, label, e in seen:
        offset = e[..., 0] - 100 * label[:, :1] - t
        assert e.shape == (2, 3, 2) and (offset - offset[:, :1]).abs().max() < 1e-4


def test_saved_and_gone_on_with_to_the_bit(packed, tmp_path, quiet):
    whole = config_of(packed, 4)
    training.train(whole, tmp_path / "whole")
    training.train(config_of(packed, 2), tmp_path / "parts")
    resume = training.what_to_resume(None, tmp_path / "parts")
    training.train(whole, resume=resume)
    assert same_bits(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts"))
    generator = checkpoint.load(tmp_path / "whole")
    assert generator.config.frame_condition_dim == 2
    assert checkpoint.load_discriminator(tmp_path / "whole").config == generator.config
    plain = make_config(packed, 4, start_from=str(tmp_path / "whole"))
    with pytest.raises(UserError, match=r"frame_condition_dim 0 \(it has 2\)"):
        training.train(plain, tmp_path / "other")


def test_grids_show_conditions_of_real_clips(packed, tmp_path, monkeypatch):
    asked = []

    def render(*args, **options):
        asked.append(options)
        return iter([torch.zeros(16, 32, 3, 32, 32, dtype=torch.uint8)])

    monkeypatch.setattr("mostgan.progress.render", render)
    generator = mostgan.Generator(config_of(packed).model)
    training.save_grids(tmp_path, generator, Clips(packed), 0, 25.0)
    for options in asked:
        assert [row[0] for row in options["label"]] == [0, 1, 2] * 5 + [0]
        first = [rows[:, 0].tolist() for rows in options["frame_condition"][:2]]
        assert first == [[*range(20), *[19] * 12], [*range(100, 125), *[124] * 7]]


def test_metrics_draw_conditions_from_the_data(packed, monkeypatch):
    clips, model = Clips(packed), config_of(packed).model
    generator, asked = mostgan.Generator(model).eval(), []
    whole = sets.render
    monkeypatch.setattr(sets, "render", lambda *a, **o: asked.append(o) or whole(*a, **o))
    protocol = Protocol(clips=40, frames=16, long_clips=0, batch=40)
    conditions = sets.conditions_of(clips, model.num_labels, model.frame_condition_dim)
    made_set = GeneratedSet(generator, protocol, 0, conditions, clips)
    next(made_set._render(0, 40, 16))
    starts = set()
    for label, rows in zip(asked[0]["label"], asked[0]["frame_condition"]):
        assert len(rows) >= 16 and int(rows[0, 0]) // 100 == label[0]
        assert np.array_equal(rows, counted(len(rows), rows[0, 0]))
        starts.add((int(label[0]), int(rows[0, 0]) % 100))
    assert len({clip for clip, _ in starts}) == 3 and len(starts) > 10
    with pytest.raises(UserError, match="3 numbers as a condition of every frame"):
        sets.conditions_of(clips, 2, 3)
    scores = mostgan.metrics.evaluate(generator, clips, open_detectors(None, None, CPU), 4, 16)
    assert scores["proxy_fvd16"] > 0


def save(folder, generator):
    folder.mkdir()
    checkpoint.save(folder, 1, generator.config, generator.state_dict(), {}, {})


def test_sample_takes_the_conditions_of_a_clip_in_a_file(tmp_path):
    save(tmp_path / "run", make(num_labels=2, frame_condition_dim=2))
    entries = {"a": np.ones(2, np.float32), "a/frames": counted(9) / 9}
    save_file(entries, tmp_path / "one.safetensors")
    save_file(
        entries | {"b/x": np.zeros(2), "b/x/frames": counted(1)}, tmp_path / "two.safetensors"
    )

    def sampled(name, *condition, **options):
        options |= {"checkpoint": tmp_path / "run", "frames": 6, "precision": "float32"}
        options |= {"out": tmp_path / f"{name}.npy", "condition": condition}
        sample.sample(sample.Options(**options))
        return np.load(tmp_path / f"{name}.npy")

    frames = sampled("a", f"{tmp_path}/one.safetensors")
    generator = checkpoint.load(tmp_path / "run")
    options = {"frames": 6, "label": [1.0, 1.0], "frame_condition": entries["a/frames"]}
    expected = torch.cat(list(mostgan.render(generator, 0, **options)), dim=1)[0]
    assert np.abs(frames - expected.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    assert np.array_equal(frames, sampled("a2", f"{tmp_path}/two.safetensors:a"))
    assert not np.array_equal(frames, sampled("b", f"{tmp_path}/two.safetensors:b/x"))
    # Of a clip in a packed folder, which was cut from a longer one.
    (tmp_path / "src").mkdir()
    np.save(tmp_path / "src" / "a.npy", np.zeros((9, 32, 32, 3), np.uint8))
    packed, file = tmp_path / "packed", tmp_path / "one.safetensors"
    prepare.prepare(tmp_path / "src", packed, 32, conditions=file, clip_length=4, jobs=1)
    save_file(entries | {"a/frames": entries["a/frames"][4:8]}, tmp_path / "cut.safetensors")
    of_file = sampled("cut", f"{tmp_path}/cut.safetensors")
    assert np.array_equal(of_file, sampled("packed", f"{packed}:a.npy#1"))
    colon = packed.rename(tmp_path / "packed: of clips")
    assert np.array_equal(of_file, sampled("colon", f"{colon}:a.npy#1"))
    colon.rename(packed)
    with pytest.raises(UserError, match="--label and --condition exclude each other"):
        sampled("both", f"{packed}:a.npy#1", label=0)
    assert not np.array_equal(of_file, frames)
    for text, word in (
        (f"{packed}:b", "has no clip b; give one, such as .*packed:a.npy#0"),
        (f"{packed}", "has 2 clips; give one"),
        ("", "neither a file nor numbers"),
        (f"{tmp_path}/two.safetensors", "has 2 clips; give one, such as .*two.safetensors:a"),
        (f"{tmp_path}/one.safetensors:c", "has no clip c; give one, such as"),
        (f"{tmp_path}/none.safetensors:c", "there is no such file or folder"),
    ):
        with pytest.raises(UserError, match=word):
            sampled("bad", text)
    with pytest.raises(UserError, match="neither a file nor numbers"):
        sampled("bad", "x", "y")
    with pytest.raises(UserError, match="2 numbers at every frame"):
        sampled("bad", "0.5", "-1")


def test_the_command_that_a_training_ends_with_samples_its_model(packed, tmp_path, quiet, capsys):
    training.train(config_of(packed), tmp_path / "run")
    words = shlex.split(capsys.readouterr().out.split("sample with: python sample.py")[1])
    words[words.index("--frames") + 1] = "2"
    assert sample.sample(tyro.cli(sample.Options, args=[*words, "--out", f"{tmp_path}/a.npy"]))


def test_an_export_is_refused(tmp_path):
    with pytest.raises(UserError, match="frame conditions cannot be exported"):
        export_file(make(frame_condition_dim=3), tmp_path / "a.pt2")


# ------------------------------------------------------------------------------------- end to end

# A curtain in red or blue, as the clip's condition says, falls or rises, as the condition of all
# its frames says: its edge crosses the middle of the frame half-way through the clip, so that no
# single frame tells which. The conditions are large for a short training: as loud as all else that
# the networks are told.
COLOUR, DIRECTION = 8.0, 20.0
CURTAIN_FRAMES, STEPS, CLIPS_OF_EACH = 9, 350, 8


def conditions_of(name, colour, direction):
    """Entries of a curtain: its clip's condition, and that of its frames."""
    of_frames = np.full((CURTAIN_FRAMES, 1), DIRECTION * direction)
    return {name: np.array([COLOUR * colour]), f"{name}/frames": of_frames}


def write_curtains(folder):
    """64 clips of 32² as arrays, and their conditions; and conditions of four clips to sample."""
    rng, y, entries, wanted = np.random.default_rng(0), np.arange(32) - 15.5, {}, {}
    (folder / "src").mkdir()
    for clip in range(64):
        colour, direction = (1, -1)[clip % 2], (1, -1)[clip // 2 % 2]
        t = np.arange(CURTAIN_FRAMES) - (CURTAIN_FRAMES - 1) / 2
        edge = 2.5 * direction * rng.uniform(0.8, 1.2) * t + rng.uniform(-2, 2)
        curtain = 155 / (1 + np.exp((y - edge[:, None]) / 3))
        rgb = np.stack([50 + 45 * shade * colour + curtain for shade in (1, 0, -1)], axis=-1)
        frames = rgb[:, :, None].repeat(32, axis=2).astype(np.uint8)
        np.save(folder / "src" / f"{clip:02d}.npy", frames)
        entries |= conditions_of(f"{clip:02d}", colour, direction)
        wanted |= conditions_of(f"{colour},{direction}", colour, direction)
    save_file(entries, folder / "curtains.safetensors")
    save_file(wanted, folder / "wanted.safetensors")


def measured(frames):
    """Of clips uint8 [clips, T, H, W, 3]: how much more red than blue they are, in levels, and by
    how many rows a frame they move down: half of the shift that makes frames look most like those
    two later.
    """
    redness = (frames[..., 0].astype(float) - frames[..., 2]).mean(axis=(1, 2, 3))
    rows, shifts = frames.mean(axis=(3, 4)), np.arange(-12, 13)  # [clips, T, H]
    before, after, y = rows[:, :-2], rows[:, 2:], np.arange(rows.shape[2])
    moved = [before[:, :, np.clip(y - shift, 0, y[-1])] for shift in shifts]
    unlike = [((of_shift - after) ** 2).sum(axis=(1, 2)) for of_shift in moved]
    return redness, shifts[np.argmin(unlike, axis=0)] / 2


def curtains_config(seed):
    model = ModelConfig(
        resolution=32,
        channel_base=256,
        channel_max=32,
        z_dim=8,
        w_dim=16,
        motion_noise_dim=8,
        motion_code_dim=16,
        num_frequencies=8,
        max_period=32,
        shortest_period=32,
        motion_distance=1024,
        motion_vector_dim=16,
        motion_styles=2,
        rank=4,
        hypernetwork="affine",
        modulation_order="motion_first",
        motion_resolutions=(4, 8, 16, 32),
        frames_per_clip=2,
        discriminator_hidden_dim=32,
    )
    return TrainConfig(
        model,
        preset="tiny",
        conditional=True,
        seed=seed,
        batch_clips=8,
        batch_split=1,
        shared_fakes=True,
        mirror=False,
        augment="none",
        generator_lr=0.012,
        discriminator_lr=0.006,
        r1_gamma=1.0,
        diversity_weight=0.0,
        ema_half_life_kclips=0.2,
        ema_rampup=0.1,
        total_kframes=16 * STEPS / 1000,
        log_kframes=0.8,
        snapshot_kframes=100,
        precision="float32",
        compile=False,
        workers=0,
    )


def train_on_curtains(folder, seed=0):
    """The run that prepare and train make of write_curtains."""
    write_curtains(folder)
    conditions = folder / "curtains.safetensors"
    prepare.prepare(folder / "src", folder / "packed", 32, conditions=conditions, jobs=1)
    config = dataclasses.replace(curtains_config(seed), data=str(folder / "packed"))
    training.train(config, folder / "run")
    return folder / "run"


def followed(folder, checkpoint_path, conditional=True):
    """For each clip that is sampled under each of four pairs of conditions, by sample.py: redness
    and motion, with the sign that makes the right ones positive: two arrays [4 · CLIPS_OF_EACH].
    """
    found = []
    for colour, direction in itertools.product((1, -1), repeat=2):
        out, file = folder / "a.npy", folder / "wanted.safetensors"
        wanted = (f"{file}:{colour},{direction}",) if conditional else ()
        options = dict(frames=CURTAIN_FRAMES, grid=f"1x{CLIPS_OF_EACH}", condition=wanted)
        options |= dict(force=True, precision="float32", compile=False, seed=1000)
        sample.sample(sample.Options(checkpoint_path, out, **options))
        side_by_side = np.load(out)  # [T, 32, clips · 32, 3]
        redness, motion = measured(np.stack(np.split(side_by_side, CLIPS_OF_EACH, axis=2)))
        found.append((colour * redness, direction * motion))
    return np.concatenate(found, axis=1)


def test_samples_follow_both_conditions(tmp_path, quiet):
    """Real clips are 90 levels redder than blue, or the other way, and move down or up by 2.5 rows
    a frame. With each of the seeds 0 to 4 every clip was right: by 70 to 85 levels and 1.3 to 2.2
    rows a frame on average, the worst one by 28 and 0.5.
    """
    redness, motion = followed(tmp_path, train_on_curtains(tmp_path))
    assert (redness > 10).mean() > 0.8 and redness.mean() > 30
    assert (motion > 0).mean() > 0.8 and motion.mean() > 0.8
    # A model without conditions gives all four the same clips, which fit half of them at most.
    plain = dataclasses.replace(curtains_config(0).model, fps=25.0)
    save(tmp_path / "plain", mostgan.Generator(plain))
    redness, motion = followed(tmp_path, tmp_path / "plain", conditional=False)
    assert (redness > 10).mean() <= 0.5 and abs(redness.mean()) < 1e-3
    assert (motion > 0).mean() <= 0.5 and abs(motion.mean()) < 1e-3
