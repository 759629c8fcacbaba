"""bench/ablations.py: every row of every table is a training that train.py accepts, what counts as
a difference, and runs that are done are not done again.
"""

import json

import numpy as np
import pytest

import train
from bench import ablations
from mostgan.config import UserError
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


def test_differences_are_rarely_found_where_there_are_none():
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        rows = [row(*rng.normal(30, 3, 3), default=i == 0) for i in range(5)]
        ablations.compare(rows, rows[0])
        found += any(of.get("differs") for of in rows)
    assert found < 0.08 * 200


def test_the_visible_difference_is_seen_four_times_in_five():
    rng = np.random.default_rng(1)
    many = [row(*rng.normal(30, 2, 6)) for _ in range(400)]
    apart, seen = ablations.visible_difference(many), 0
    for one, other in zip(many[::2], many[1::2]):
        default, moved = (
            row(*ablations.of_runs(one)),
            row(*(np.array(ablations.of_runs(other)) + apart)),
        )
        ablations.compare([default, moved], default)
        seen += moved["differs"]
    assert 0.7 < seen / 200 < 0.9


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
            if len(calls) == 1:
                raise UserError("interrupted")
        else:
            words[words.index("--out") + 1].write_text('{"results": {"proxy_fvd16": {"mean": 5}}}')

    with pytest.raises(UserError):
        ablations.train_and_score(run, plan, first, 0)
    assert ablations.train_and_score(run, plan, first, 0) == {"proxy_fvd16": 5}
    assert ablations.train_and_score(run, plan, first, 0) == {"proxy_fvd16": 5}
    assert [words[0] for words in calls] == ["train.py", "train.py", "-m"]
    assert "--out" in calls[0] and "--resume" in calls[1]


@pytest.mark.slow
def test_a_row_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "TIMED", 0.024)
    pack_sky(sky := tmp_path / "sky", 64, count=8, frames=20)
    out = tmp_path / "table.json"
    arguments = dict(kframes=0.024, seeds=1, rows=(0,), clips=2, work=tmp_path / "runs", out=out)
    ablations.ablate("5", sky, **arguments)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["minutes"] > 0 and row["scores"][0]["proxy_fvd16"] > 0
    assert "too few" not in out.with_suffix(".md").read_text()
    with pytest.raises(UserError, match="rows 0 to 1"):
        ablations.ablate("5", sky, rows=(2,))
