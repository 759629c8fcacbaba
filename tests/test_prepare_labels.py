"""Labels: folders, dataset.json, CSV, in the ways in which tables name clips; numbers with gaps;
vectors."""

import json
import tarfile
import zipfile

import made_clips as made
import numpy as np
import pytest
from made_clips import command, numbered, write_pictures, write_video

from mostgan.config import UserError
from mostgan.data import Clips

FOLDERS = ["cats/one", "cats/two", "dogs/Three"]  # folders of pictures; and a video:
VIDEO = "dogs/four.mp4"
LABELS = {"cats/one": 3, "cats/two": 1, "dogs/Three": 3, "dogs/four": 0}
EXPECTED = [
    3,
    1,
    0,
    3,
]  # in the natural order of the names: cats/one, cats/two, dogs/four.mp4, dogs/Three


@pytest.fixture
def src(tmp_path):
    for k, name in enumerate(FOLDERS):
        write_pictures(tmp_path / "src" / name, made.smallest(3 + k))
    write_video(tmp_path / "src" / VIDEO, numbered(6, 16, 16))
    return tmp_path / "src"


def labels_by_name(clips):
    """{clip: class's name or number, or vector} whatever the order of the clips."""
    classes = (clips.info["labels"] or {}).get("classes")
    return {
        name.removesuffix(".mp4"): classes[label] if classes else label
        for name, label in zip(clips.names, clips.labels)
    }


def packed(src, tmp_path, table, how="dataset.json"):
    """Packs with a table: a dataset.json in the source, or a file given by --labels."""
    place = src / "dataset.json" if how == "dataset.json" else tmp_path / how
    if place.suffix == ".json":
        place.write_text(json.dumps({"labels": table}))
    else:
        rows = table.items() if isinstance(table, dict) else table
        place.write_text("".join(f"{name},{label}\n" for name, label in rows))
    return made.pack(src, tmp_path / "dst", 16, labels=None if how == "dataset.json" else place)


# ------------------------------------------------------------------------------ how clips are named


def of_frames(labels):
    """A row for each picture, as the earlier codebases have it, and one for the video."""
    rows = []
    for k, name in enumerate(FOLDERS):
        rows += [[f"{name}/{frame:03d}.png", labels[name]] for frame in range(3 + k)]
    return [*rows, [VIDEO, labels["dogs/four"]]]


FORMS = {
    "clips": lambda name: name,
    "suffixes": lambda name: f"{name}.mp4" if name == "dogs/four" else name,
    "wrong suffixes": lambda name: f"{name}.avi",
    "backslashes": lambda name: name.replace("/", "\\"),
    "a folder more": lambda name: f"train/{name}",
    "two folders more": lambda name: f"data/train/{name}.mp4",
    "dot": lambda name: f"./{name}",
    "absolute": lambda name: f"/home/someone/data/{name}",
    "Windows": lambda name: "C:\\data\\" + name.replace("/", "\\"),
    "a folder less": lambda name: name.split("/")[1],
    "other case": lambda name: name.upper(),
    "all of it": lambda name: "D:\\DATA\\" + name.upper().replace("/", "\\") + ".MP4",
}


@pytest.mark.parametrize("how", ["dataset.json", "table.json", "table.csv"])
@pytest.mark.parametrize("form", FORMS)
def test_tables_name_clips_in_many_ways(src, tmp_path, how, form):
    table = [[FORMS[form](name), label] for name, label in LABELS.items()]
    index, clips = packed(src, tmp_path, table, how)
    found = labels_by_name(clips)
    assert {name: int(label) for name, label in found.items()} == LABELS, index["notes"]


@pytest.mark.parametrize("how", ["dataset.json", "table.json", "table.csv"])
@pytest.mark.parametrize(
    "change", ["plain", "backslashes", "prefix", "case", "no suffix", "mapping"]
)
def test_tables_of_frames(src, tmp_path, how, change):
    changes = {
        "backslashes": lambda name: name.replace("/", "\\"),
        "prefix": lambda name: f"all/{name}",
        "case": str.upper,
        "no suffix": lambda name: name.rsplit(".", 1)[0],
    }
    rows = [[changes.get(change, str)(name), label] for name, label in of_frames(LABELS)]
    table = dict(rows) if change == "mapping" else rows
    _, clips = packed(src, tmp_path, table, how)
    assert {name: int(label) for name, label in labels_by_name(clips).items()} == LABELS


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_the_table_in_an_archive(src, tmp_path, form):
    (src / "dataset.json").write_text(json.dumps({"labels": of_frames(LABELS)}))
    path = tmp_path / f"a.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(src.rglob("*.*")):
                archive.write(file, file.relative_to(src))
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(src, "src")
    _, clips = made.pack(path, tmp_path / "dst", 16)
    assert {
        name.removeprefix("src/"): int(label) for name, label in labels_by_name(clips).items()
    } == LABELS


def test_csv_files_as_people_write_them(src, tmp_path):
    rows = {name.split("/")[1]: label for name, label in LABELS.items()}
    texts = {
        "header.csv": "name,label\n" + "".join(f"{name},{label}\n" for name, label in rows.items()),
        "bom.csv": "\ufeff" + "".join(f"{name}.mp4,{label}\r\n" for name, label in rows.items()),
        "quoted.csv": "".join(f'"{name}","{label}"\n' for name, label in rows.items()) + "\n\n",
        "semicolons.csv": "".join(f"{name};{label}\n" for name, label in rows.items()),
        "tabs.tsv": "".join(f"{name}\t{label}\n" for name, label in rows.items()),
        "spaces.txt": "".join(f"{name} {label}\n" for name, label in rows.items()),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        _, clips = made.pack(src, tmp_path / f"dst-{name}", 16, labels=tmp_path / name)
        assert {clip: int(label) for clip, label in labels_by_name(clips).items()} == LABELS, name


def test_clips_of_one_film_have_its_label(src, tmp_path):
    (src / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    _, clips = made.pack(src, tmp_path / "dst", 16, clip_length=3)
    four = [
        clips.labels[k]
        for k, source in enumerate(clips.info["clips"]["source"])
        if "four" in source
    ]
    assert len(four) == 2 and len(set(four)) == 1


# ------------------------------------------------------------------------ what matches and what not


def test_a_table_that_matches_nothing_is_an_error(src, tmp_path):
    for how in ("dataset.json", "table.csv"):
        with pytest.raises(UserError) as error:
            packed(src, tmp_path, {"xyzzy/1": 0, "plugh/2": 1}, how)
        text = str(error.value)
        assert "\n" not in text and "xyzzy/1" in text and how in text
        (src / "dataset.json").unlink(missing_ok=True)
        assert not (tmp_path / "dst" / "index.json").exists()


def test_a_table_that_matches_some_says_how_many_and_shows_three(src, tmp_path):
    extra = {f"gone/{k}": 1 for k in range(7)}
    index, clips = packed(src, tmp_path, {"cats/one": 3, "cats/two": 1, "dogs/four": 3} | extra)
    assert labels_by_name(clips) == {
        "cats/one": "3",
        "cats/two": "1",
        "dogs/four": "3",
    }  # the fourth is left out
    assert made.notes_on(index, "dogs/Three")
    told = [note for note in made.notes_on(index, "gone/0") if note["count"] == 7]
    assert (
        told
        and sum(f"gone/{k}" in told[0]["why"] + " ".join(told[0]["names"]) for k in range(7)) >= 3
    )


def test_tables_that_are_no_tables(src, tmp_path, capfd):
    for text in (
        "{{{",
        "[]",
        '{"labels": 3}',
        '{"labels": [["cats/one"]]}',
        '{"labels": [["cats/one", null]]}',
        "\xff\xfe",
    ):
        (src / "dataset.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"dataset\.json") as error:
            # Shown when nothing is raised.
            print(made.pack(src, tmp_path / "dst", 16)[0]["labels"], text)
        assert "\n" not in str(error.value)
    (src / "dataset.json").write_text('{"labels": null}')
    assert made.pack(src, tmp_path / "none", 16)[1].labels is None
    (tmp_path / "bad.csv").write_text("cats/one\ncats/two\n")
    for how in (tmp_path / "bad.csv", tmp_path / "missing.csv"):
        with pytest.raises(UserError, match=how.name):
            made.pack(src, tmp_path / "dst", 16, labels=how)


# ------------------------------------------------------------------------------- what labels become


def test_classes_by_folders(src, tmp_path):
    index, clips = made.pack(src, tmp_path / "dst", 16, labels="folders")
    assert index["labels"] == {"classes": ["cats", "dogs"]} and clips.num_labels == 2
    assert clips.labels.dtype == np.int64 and sorted(clips.labels.tolist()) == [0, 0, 1, 1]
    assert labels_by_name(clips)["dogs/four"] == "dogs"
    one_hot = clips.condition(int(np.flatnonzero(clips.labels == 1)[0]))
    assert one_hot.dtype == np.float32 and one_hot.tolist() == [0, 1]
    write_pictures(src / "loose", made.smallest())
    with pytest.raises(UserError, match="loose") as error:
        made.pack(src, tmp_path / "new", 16, labels="folders")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "numbers",
    [[3, 1, 3, 0], [7, 100, 7, 20_240_131], [20_240_131_235_959, 5, 5, 5], [-4, 2, -4, 9]],
)
def test_numbers_with_gaps_are_mapped_and_the_mapping_is_kept_and_printed(
    src, tmp_path, capfd, numbers
):
    table = dict(zip(LABELS, numbers))
    (src / "dataset.json").write_text(json.dumps({"labels": table}))
    status, out, error = command(capfd, src, tmp_path / "dst", "--resolution", 16)
    assert status == 0, error
    clips = Clips(tmp_path / "dst")
    classes = [str(value) for value in sorted(set(numbers))]
    assert clips.info["labels"] == {"classes": classes} and clips.num_labels == len(classes)
    assert sorted(set(clips.labels.tolist())) == list(range(len(classes)))
    assert {name: int(label) for name, label in labels_by_name(clips).items()} == table
    if classes != [str(k) for k in range(len(classes))]:
        assert all(name in out for name in classes)


def test_names_that_python_would_take_for_numbers_are_names(src, tmp_path):
    months = ["2020_01", "202_001", "2020_02", "2020_01"]
    (tmp_path / "t.csv").write_text("".join(f"{n},{m}\n" for n, m in zip(LABELS, months)))
    index, _ = made.pack(src, tmp_path / "dst", 16, labels=tmp_path / "t.csv")
    assert index["labels"] == {"classes": ["202_001", "2020_01", "2020_02"]}


def test_a_table_that_is_used_is_not_among_the_files_left_out(src, tmp_path):
    index, _ = packed(src, tmp_path, dict.fromkeys(LABELS, 0))
    assert not made.notes_on(index, ".json")


def test_names_as_classes(src, tmp_path):
    index, clips = packed(src, tmp_path, dict(zip(LABELS, ["tabby", "siamese", "poodle", "tabby"])))
    assert index["labels"] == {"classes": ["poodle", "siamese", "tabby"]}
    assert labels_by_name(clips)["dogs/Three"] == "poodle"


@pytest.mark.parametrize("how", ["dataset.json", "table.csv"])
def test_vectors_are_kept_as_they_are(src, tmp_path, how):
    vectors = np.random.default_rng(0).normal(0, 3, (4, 5)).astype(np.float32)
    rows = dict(zip(LABELS, vectors.tolist()))
    if how == "table.csv":
        text = "".join(f"{name},{','.join(map(repr, row))}\n" for name, row in rows.items())
        (tmp_path / how).write_text(text)
        index, clips = made.pack(src, tmp_path / "dst", 16, labels=tmp_path / how)
    else:
        index, clips = packed(src, tmp_path, rows)
    assert index["labels"] == {"size": 5} and clips.num_labels == 5
    assert clips.labels.dtype == np.float32 and clips.labels.shape == (4, 5)
    for name, row in labels_by_name(clips).items():
        assert (row == np.float32(rows[name])).all()
    assert clips.condition(2).dtype == np.float32 and (clips.condition(2) == clips.labels[2]).all()
    assert (tmp_path / "dst" / "labels.safetensors").exists()


def test_vectors_that_do_not_fit_together(src, tmp_path):
    for rows in (
        [[1.0, 2.0], [1.0], [0.5, 1], [0.5, 1]],
        [[1.0, 2.0], 3, [0.5, 1], [0.5, 1]],
        [[1.0, float("nan")], [1, 2], [3, 4], [5, 6]],
        [[1.0, "a"], [1, 2], [3, 4], [5, 6]],
    ):
        with pytest.raises(UserError, match=r"dataset\.json") as error:
            packed(src, tmp_path, dict(zip(LABELS, rows)))
        assert "\n" not in str(error.value)


def test_pictures_of_one_clip_with_different_labels(src, tmp_path):
    """A table of frames whose labels change within a clip has none for the clip: that is said."""
    rows = of_frames(LABELS)
    rows[1][1] = 0
    index, clips = packed(src, tmp_path, rows)
    assert made.notes_on(index, "cats/one") and "cats/one" not in labels_by_name(clips)
