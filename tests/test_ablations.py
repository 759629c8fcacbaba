"""bench/ablations.py: every row of every table is a training that train.py accepts, what counts as
a difference, and runs that are done are not done again.
"""

import json

import numpy as np
import pytest
from scipy import stats

import train
from bench import ablations
from mostgan.config import UserError, train_preset
from mostgan.prepare import pack_sky


def row(*values, default=False):
    scores = [{"proxy_fvd16": value} for value in values]
    return dict(name="x", paper="", minutes=6, scores=scores, default=default)


@pytest.mark.parametrize("table", ablations.TABLES)
def test_every_row_is_a_configuration(table, tmp_path):
    chosen = ablations.TABLES[table]
    plan = ablations.Plan(tmp_path, "tiny", 1, 8, None, tmp_path)
    parsed = [train.parse(plan.train_options(row))[0].config for row in chosen.rows]
    assert len({repr(config) for config in parsed}) == len(parsed) > 1
    assert len({plan.folder(row, 0) for row in chosen.rows}) == len(parsed)
    default = train.parse(["--preset", "tiny", "--data", str(tmp_path)])[0].config
    if table != "where":  # it says itself whose clips D judges
        assert parsed[chosen.default] == default


@pytest.mark.parametrize(
    "table, field, values",
    [
        ("2", "motion_styles", [0, 1, 6, 8, 10]),
        ("3", "modulation_order", ["content_first", "motion_first"]),
        ("4", "motion_difference", [False, True, False, True]),
        ("4", "motion_styles", [0, 0, 8, 8]),
        ("6", "motion_vector_dim", [64, 128, 256]),
        ("7", "rank", [1, 3, 5, 10]),
        ("where", "prenorm_resolutions", [(), (16, 32), (), (16, 32), ()]),
        ("where", "motion_demod_only_resolutions", [(), (), (16, 32), (16, 32), ()]),
    ],
)
def test_rows_are_what_they_are_called(table, field, values, tmp_path):
    plan = ablations.Plan(tmp_path, "tiny", 1, 8, None, tmp_path)
    rows = ablations.TABLES[table].rows
    parsed = [train.parse(plan.train_options(row))[0].config for row in rows]
    assert [getattr(config.model, field) for config in parsed] == values


def test_row_0_is_stylegan_v(tmp_path):
    plan = ablations.Plan(tmp_path, "tiny", 1, 8, None, tmp_path)
    model = train.parse(plan.train_options(ablations.TABLES["2"].rows[0]))[0].config.model
    assert model.motion_styles == 0 and not model.motion_difference
    assert model.discriminator_hidden_dim == 512


def test_a_clear_difference_is_one_and_noise_is_none():
    default, near, far = row(25, 27, 29, default=True), row(24, 28, 30), row(60, 61, 63)
    ablations.compare([default, near, far], default)
    assert far["differs"] and not near["differs"] and "p" not in default
    assert "| yes (p = " in ablations.markdown(told([default, near, far]))


def test_welchs_p_is_corrected_by_holm():
    """Rows of unequal spreads; p of each by Welch's formula, times 3, 2 and 1, never falling."""
    rows = [row(20, 21, 25, default=True), row(30, 39, 33), row(26, 27, 25.5), row(25, 29, 27)]
    ablations.compare(rows, rows[0])
    raw = []
    for other in rows[1:]:
        of = [np.array(ablations.of_runs(each)) for each in (other, rows[0])]
        errors = [x.var(ddof=1) / 3 for x in of]
        t = (of[0].mean() - of[1].mean()) / sum(errors) ** 0.5
        degrees = sum(errors) ** 2 / sum(error**2 / 2 for error in errors)
        raw.append(2 * float(stats.t.sf(abs(t), degrees)))
    first, last, middle = raw
    assert first < middle < last < 2 * middle  # so that the last one's p must not fall again
    assert [other["p"] for other in rows[1:]] == pytest.approx([3 * first, 2 * middle, 2 * middle])


def test_differences_are_rarely_found_where_there_are_none():
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        rows = [row(*rng.normal(30, 3, 3), default=i == 0) for i in range(5)]
        ablations.compare(rows, rows[0])
        found += any(of.get("differs") for of in rows)
    assert found < 0.08 * 200


@pytest.mark.parametrize("trainings, others", [(3, 1), (3, 4), (6, 1)])
def test_the_visible_difference_is_seen_four_times_in_five(trainings, others):
    """One row differs by so much, and the rest do not."""
    rng = np.random.default_rng(1)
    exact = np.resize([-1.0, 1.0], trainings) + 30
    exact = 30 + 2 * (exact - exact.mean()) / exact.std(ddof=1)  # deviates by 2
    apart = ablations.visible_difference([row(*exact) for _ in range(1 + others)])
    seen = 0
    for _ in range(300):
        rows = [row(*rng.normal(30, 2, trainings)) for _ in range(others)]
        rows += [row(*rng.normal(30 + apart, 2, trainings))]
        ablations.compare(rows, rows[0])
        seen += rows[-1]["differs"]
    assert 0.72 < seen / 300 < 0.88


def told(rows):
    return dict(title="t", about="a", columns="c", rows=rows, visible_difference=1.5)


def test_one_training_a_row_makes_no_claim():
    default, other = row(25, default=True), row(60)
    ablations.compare([default, other], default)
    assert "differs" not in other and ablations.visible_difference([default, other]) is None
    assert "too few trainings" in ablations.markdown(
        told([default, other]) | {"visible_difference": None}
    )


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    plan = ablations.Plan(tmp_path, "tiny", 2, 8, None, tmp_path)
    first, calls = ablations.TABLES["3"].rows[0], []

    def run(words, log):
        calls.append(words)
        if words[0] == "train.py":
            folder = plan.folder(first, 0)
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("{}")
            frames = 2000 if len(calls) > 1 else 1000  # a signal stops the first one early
            (folder / "checkpoint-000001").mkdir(exist_ok=True)
            saved = folder / "checkpoint-000001" / "training.json"
            saved.write_text(json.dumps({"frames": frames}))
        else:
            words[words.index("--out") + 1].write_text('{"results": {"proxy_fvd16": {"mean": 5}}}')

    with pytest.raises(UserError, match="stopped early"):
        ablations.train_and_score(run, plan, first, 0)
    assert ablations.train_and_score(run, plan, first, 0) == {"proxy_fvd16": 5}
    assert ablations.train_and_score(run, plan, first, 0) == {"proxy_fvd16": 5}
    assert [words[0] for words in calls] == ["train.py", "train.py", "-m"]
    assert "--out" in calls[0] and "--resume" in calls[1]
    assert calls[0][calls[0].index("--seed") + 1] == 0
    with pytest.raises(UserError, match="was trained for longer than 1 k frames"):
        ablations.train_and_score(run, plan._replace(kframes=1), first, 0)
    for damaged in ("{", '{"results": {}}'):  # is made again
        next(plan.folder(first, 0).glob("scores-2k-8-*")).write_text(damaged)
        assert ablations.train_and_score(run, plan, first, 0) == {"proxy_fvd16": 5}
    # Other clips are another score of the same training.
    ablations.train_and_score(run, plan._replace(clips=4), first, 0)
    assert calls[-1][0] == "-m" and calls[-1][calls[-1].index("--clips") + 1] == 4


def test_half_a_timing_is_made_anew(tmp_path):
    plan, row, calls = (
        ablations.Plan(tmp_path, "tiny", 2, 8, None, tmp_path),
        ablations.Row("a", ""),
        [],
    )
    folder = plan.folder(row, "timing")

    def run(words, log):
        assert not folder.exists() and "--out" in words
        calls.append(words)
        (folder / "checkpoint-1").mkdir(parents=True)
        frames = 24 * ablations.TIMED // (1 if len(calls) > 1 else 2)  # a signal stops the first
        (folder / "checkpoint-1" / "training.json").write_text(json.dumps({"frames": frames}))
        (folder / "stats.jsonl").write_text('{"frames": 1, "frames_per_second": 7}\n')

    with pytest.raises(UserError, match="stopped early"):
        ablations.quiet_rate(run, plan, row)
    for _ in range(2):
        assert ablations.quiet_rate(run, plan, row) == 7
    assert len(calls) == 2
    (folder / "stats.jsonl").write_text("")
    assert ablations.quiet_rate(run, plan, row) == 7 and len(calls) == 3


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="a run failed, see .*log: error: no such thing"):
        ablations.Runner(1)(
            ["-c", "import sys; sys.exit('error: no such thing')"], tmp_path / "log"
        )


@pytest.mark.parametrize(
    "number, count, text",
    [
        (257.4, 2, "260"),
        (8512.0, 3, "8,510"),
        (0.0123, 2, "0.012"),
        (5e-5, 2, "0.00005"),
        (35.52, 3, "35.5"),
        (9.0, 2, "9"),
    ],
)
def test_numbers_of_a_table_have_no_exponent(number, count, text):
    assert ablations.rounded(number, count) == text


@pytest.mark.parametrize("wrong", [dict(preset="tinny"), dict(data="file")])
def test_a_slip_claims_no_folder(tmp_path, wrong):
    (tmp_path / "file").write_text("no clips")
    data = tmp_path / wrong.pop("data", "file")
    with pytest.raises(UserError):
        ablations.ablate("5", data, work=tmp_path / "work", **wrong)
    assert not (tmp_path / "work").exists()


def test_nothing_is_started_after_a_stop(tmp_path):
    run = ablations.Runner(1)
    run.stop()
    with pytest.raises(UserError, match="stopped"):
        run(["-c", f"open({str(tmp_path / 'file')!r}, 'w')"], tmp_path / "log")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "wrong", [dict(jobs=-3), dict(jobs=0), dict(kframes=float("nan")), dict(seeds=0)]
)
def test_bad_input_is_told_before_anything_is_trained(tmp_path, wrong):
    with pytest.raises(UserError, match="must be at least"):
        ablations.ablate("5", tmp_path, work=tmp_path / "work", **wrong)
    with pytest.raises(UserError, match="--detector .* does not exist"):
        ablations.ablate("5", tmp_path, detector=tmp_path / "none", work=tmp_path / "work")
    with pytest.raises(UserError, match="NAME.json"):
        ablations.ablate("5", tmp_path, work=tmp_path / "work", out=tmp_path / "t.md")
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_row_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "TIMED", 1)
    pack_sky(sky := tmp_path / "sky", 64, count=8, frames=20)
    out = tmp_path / "table.json"
    arguments = dict(kframes=0.024, seeds=1, rows=(0,), clips=2, work=tmp_path / "runs", out=out)
    ablations.ablate("5", sky, **arguments)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["minutes"] > 0 and row["scores"][0]["proxy_fvd16"] > 0
    assert "too few" not in out.with_suffix(".md").read_text()
    with pytest.raises(UserError, match="rows 0 to 1"):
        ablations.ablate("5", sky, rows=(2,))
    # What is in this folder is of these clips.
    pack_sky(other := tmp_path / "other", 64, count=8, frames=21)
    before = out.read_bytes()
    with pytest.raises(UserError, match="has runs of other clips"):
        ablations.ablate("5", other, **arguments)
    assert out.read_bytes() == before


def test_a_training_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    done = []

    def train_and_score(run, plan, row, seed):
        if seed == 0:
            raise UserError("no memory")
        done.append((row.name, seed))
        return {"proxy_fvd16": 1.0}

    monkeypatch.setattr(ablations, "quiet_rate", lambda *args: 100.0)
    monkeypatch.setattr(ablations, "train_and_score", train_and_score)
    plan = ablations.Plan(tmp_path, "tiny", 1, 2, None, tmp_path)
    with pytest.raises(UserError, match=r"a, seed 0: no memory; 2 failed, the same command"):
        ablations.train_all(plan, [ablations.Row("a", ""), ablations.Row("b", "")], 2, 1)
    assert done == [("a", 1), ("b", 1)]


def test_speed_is_measured_over_steps_with_r1(tmp_path):
    for preset in ("tiny", "paper256"):
        config = train_preset(preset, "sky")
        plan = ablations.Plan(tmp_path, preset, 1, 2, None, tmp_path)
        frames = config.batch_clips * config.model.frames_per_clip
        assert plan.step_kframes() == frames / 1000
        assert ablations.TIMED // 2 % config.r1_interval == 0
