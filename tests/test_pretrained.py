"""The model that comes with the package: what it is, who uses it, and the program that makes it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pytest
import torch
from conftest import MODEL
from safetensors.torch import load_file

import mostgan
from bench import pretrained
from mostgan import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def test_it_is_small_and_says_where_it_comes_from():
    files = list(checkpoint.BUILT_IN.iterdir())
    assert sum(file.stat().st_size for file in files) <= 5_000_000
    state = load_file(checkpoint.BUILT_IN / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    about = json.loads((checkpoint.BUILT_IN / "provenance.json").read_text())
    assert {"made by", "commit", "processor", "date", "data", "training", "scores"} <= about.keys()
    assert about["frames"] > 1000 * about["starts"][-1]["from kframes"] > 0
    fvd = {name: of["proxy_fvd16"]["mean"] for name, of in about["scores"].items()}
    assert fvd["the sky itself"] < fvd["the model"]


def test_load_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = mostgan.load()
    assert generator.config.fps and next(generator.parameters()).dtype == torch.float32
    frames = torch.cat([w[0] for w in mostgan.render(generator, seed=1, frames=40)]).float()
    # It is no grey picture, and it moves gently.
    assert frames.std(dim=(0, 2, 3)).min() > 15
    step = (frames[1:] - frames[:-1]).abs().mean()
    assert 0.1 < step < 12 and (frames[-1] - frames[0]).abs().mean() > step


def test_sample_in_an_empty_folder(tmp_path):
    words = [sys.executable, ROOT / "sample.py", "--frames", "5"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not list(tmp_path.glob("runs"))
    assert "train your own with: python train.py --dataset sky" in done.stdout.splitlines()[0]
    with av.open(tmp_path / "samples" / "sky64-seed0.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == 5


def test_what_is_published_is_the_average_in_bf16(tmp_path, monkeypatch):
    run, generator = tmp_path / "run", mostgan.Generator(MODEL)
    run.mkdir()
    (run / "config.json").write_text('{"seed": 5, "data": "/home/me/sky"}')
    path = checkpoint.save(run, 3, MODEL, generator.state_dict(), {}, {})
    starts = [{"from kframes": 0}]
    pretrained.publish(path, tmp_path / "out", {"the model": {}}, starts)
    published = mostgan.load(tmp_path / "out")
    assert published.config == MODEL
    for ours, theirs in zip(published.state_dict().values(), generator.state_dict().values()):
        assert torch.equal(ours, theirs.bfloat16().float())
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["training"] == {"seed": 5} and about["checkpoint"] == "checkpoint-000003"
    assert about["starts"] == starts


def test_what_is_interrupted_saves_before_it_ends(tmp_path, monkeypatch):
    """A terminal's Ctrl-C reaches the training too; a signal to this program alone is handed on."""
    (tmp_path / "slow.py").write_text(
        "import signal, time, pathlib\n"
        "saved = pathlib.Path('saved')\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), saved.touch()))\n"
        "pathlib.Path('begun').touch()\n"
        "while not saved.exists():\n"
        "    time.sleep(0.01)\n"
    )
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    monkeypatch.setattr(pretrained, "PATIENCE", 0.1)

    def interrupt():
        for _ in range(6000):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        pretrained.program("slow.py")
    assert (tmp_path / "saved").exists()


def test_it_is_trained_stage_after_stage_from_where_it_is(tmp_path, monkeypatch):
    run, asked = tmp_path / "run", []

    def program(name, *words):
        """As if it had trained, and at 60 k frames were stopped by a signal."""
        asked.append(" ".join(map(str, words)))
        run.mkdir(exist_ok=True)
        (run / "config.json").touch()
        kframes = 60 if len(asked) == 1 else float(words[-1])
        saved = run / f"checkpoint-{len(asked)}"
        saved.mkdir()
        (saved / "training.json").write_text(json.dumps({"frames": 1000 * kframes}))
        # Killed between a line and its checkpoint, a run goes on from the checkpoint.
        (run / "stats.jsonl").write_text(json.dumps({"frames": 1000 * kframes + 500}) + "\n")

    monkeypatch.setattr(pretrained, "program", program)
    with pytest.raises(KeyboardInterrupt):
        pretrained.train(run, tmp_path / "sky", 300)
    pretrained.train(run, tmp_path / "sky", 300)
    assert ["--resume" in words for words in asked] == [False, True, True, True, True]
    assert [words.split()[-1] for words in asked] == ["80", "80", "109", "258", "300"]
    assert ["--r1-gamma" in words for words in asked] == [False, False, True, False, True]
    starts = pretrained.read_lines(tmp_path / "starts.jsonl")
    assert [start["from kframes"] for start in starts] == [0, 60, 80, 109, 258]
    pretrained.train(run, tmp_path / "sky", 300)
    assert len(asked) == 5
