"""Scores of generated clips against real ones, with the protocol that makes the numbers mean
something (spec §9).

    python -m mostgan.metrics runs/00000-sky-paper256 --detector i3d_torchscript.pt --runs 3
    python -m mostgan.metrics data/sky other-systems-clips --detector i3d_torchscript.pt
    torchrun --nproc-per-node 8 -m mostgan.metrics runs/00000-sky-paper256  # the same, sooner

Fréchet video distances FVD16, FVD128 and FVD128 of every 8th frame, and FID over the frames of
FVD16's clips, as far as the clips are long enough (frechet.py); how clips move, without a network
(motion_statistics.py).

Real: one random window of each clip that has n frames. Generated: frames 0 … n−1 of each clip. At
most --clips of both.
"""

import datetime
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import kernels
from mostgan import checkpoint, distributed
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.device import choose_kernels, pick_device
from mostgan.files import sha256_of, write_whole
from mostgan.metrics import Scores, label, score
from mostgan.metrics.sets import (
    ClipSet,
    Detectors,
    GeneratedSet,
    Protocol,
    conditions_of,
    from_rank_0,
    open_detectors,
)
from mostgan.prepare import open_data
from mostgan.program import run_program
from mostgan.run import read_config

PROTOCOLS = {
    "ours": "more clips than asked for are drawn from at random; every 8th frame of 128",
    "release": "more clips than asked for: the first by name; 16 frames 8 apart, from any frame on",
}


def summarize(runs: list[Scores]):
    """The scores of several runs → {name: {"mean", "std", "runs"}}, of the runs that have the name,
    each name in its first run's order; std with n − 1, None for one run.
    """
    results = {}
    for key in dict.fromkeys(key for run in runs for key in run.values):
        values = [run.values[key] for run in runs if key in run.values]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        results[key] = {"mean": float(np.mean(values)), "std": std, "runs": values}
    return results


def merge(runs: list[Scores], results) -> Scores:
    """What the runs say besides their values, each thing once; and a note where not all runs have a
    value.
    """
    whole = Scores({}, {}, [], {}, {})
    for run in reversed(runs):  # the first one's words are those that stay
        whole.skipped.update(run.skipped)
        whole.samples.update(run.samples)
    whole.notes.extend(dict.fromkeys(note for run in runs for note in run.notes))
    for key, result in results.items():
        whole.skipped.pop(key, None)
        count, name = len(result["runs"]), label(key).strip()
        if count < len(runs):
            whole.notes.append(f"{name}: of {count} of {len(runs)} runs; the others have none")
    return whole


def table(results, merged: Scores):
    """The results in lines: value ± std, and how many real and generated samples it is of."""
    lines = [f"{'':32}{'value':>12}{'±':>10}   samples, real and generated"]
    for key, result in results.items():
        std = "" if result["std"] is None else f"{result['std']:.3g}"
        samples = ", ".join(f"{count:,}" for count in merged.samples.get(key, []))
        lines.append(f"{label(key):32}{result['mean']:>12.5g}{std:>10}   {samples}".rstrip())
    for key, reason in merged.skipped.items():
        lines.append(f"{label(key):32}{'—':>12}{'':10}   {reason}")
    lines += [f"note: {note}" for note in merged.notes]
    if any(key.startswith("proxy_") for key in results):
        lines.append(
            "note: proxy: features of a random network, as no detector was given (--detector, "
            "--frame-detector); good only for comparing runs with one another"
        )
    return "\n".join(lines)


def protocol_lines(protocol):
    """The protocol of a report in a few lines; the JSON file has all of it."""
    lines = []
    for which in ("real", "generated"):
        described = protocol[which]
        text = f"{described.get('data') or described.get('checkpoint')}, "
        text += f"{described['total']:,} clips of {described['resolution']}²"
        if "data" in described:
            split = f"{described['split']} split" if described["split"] else "no split"
            text += f", {described['fps']:g} frames/s, crop {described['crop']}, {split}; of each, "
            text += f"{described['window']}; checksum {described['checksum'][:12]}"
        else:
            text += f" from {described['times']}, in {protocol['precision']}; "
            text += f"sha256 {described['sha256'][:12]}"
        lines.append(f"{which:10}{text}")
    for which in ("video", "frame"):
        detector = protocol[f"{which}_detector"]
        lines.append(f"{which:10}{detector['name']}, sha256 {detector['sha256'][:12]}")
    lines.append(f"protocol  {protocol['protocol']}: {PROTOCOLS[protocol['protocol']]}")
    lines.append(f"seeds     {protocol['seed']} to {protocol['seed'] + protocol['runs'] - 1}")
    return "\n".join(lines)


def report(runs, results, merged: Scores, sets, protocol, detectors: Detectors, seed):
    """All that the JSON file says: the results and the whole protocol."""
    described = {}
    for which, of in (("video", detectors.video), ("frame", detectors.frame)):
        told = {"name": of.name, "sha256": of.sha256, "proxy": of.proxy}
        described[f"{which}_detector"] = told
    cuda = detectors.device.type == "cuda"
    return {
        "format": "mostgan-metrics",
        "version": 1,
        "date": datetime.date.today().isoformat(),
        "results": results,
        "not_measured": merged.skipped,
        "notes": merged.notes,
        "samples": merged.samples,
        "temporal_spectra": [run.spectra for run in runs],
        "protocol": asdict(protocol)
        | described
        | {
            "real": sets[0].describe(),
            "generated": sets[1].describe(),
            "runs": len(runs),
            "seed": seed,
            "seeds": "run r draws windows, latents and labels anew, keyed by seed + r",
            "windows": {
                name: {"frames": window.frames, "stride": window.stride, "frame_stride": stride}
                for window, names in protocol.video_metrics.items()
                for name, stride in names.items()
            },
            "detector_precision": "float32",
            "statistics_precision": "float64",
            "covariance": "population",
            "tf32_convolutions": cuda and torch.backends.cudnn.allow_tf32,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "kernels": kernels.chosen(detectors.device),
            "processes": distributed.size(),
            "torch": torch.__version__,
        },
    }


# ------------------------------------------------------------------------------------- command line


def open_checkpoint(path, data, device):
    """(generator, its path, real clips): the data named, or what the checkpoint's run was trained
    on.
    """
    path = checkpoint.find(path)
    generator = checkpoint.load(path, device)
    if device.type == "cuda":
        generator.synthesis.compile()  # minutes on a CPU, for nothing
    try:
        data = data or read_config(path.parent).data
    except UserError:
        raise UserError(f"{path} does not lie in a run: say which real clips with --data") from None
    clips = from_rank_0(lambda: open_data(data, "sky", generator.config.resolution))
    return generator, path, clips


def open_two(first, second, resolution):
    """Two sets of clips at one resolution: of the packed one, if either is packed, else as asked,
    else 256.
    """
    for path in (first, second):  # before the hours that packing the other may take
        if not path.exists():
            raise UserError(f"{path} does not exist")
    packed = [Clips(path) for path in (first, second) if (path / "index.json").exists()]
    resolution = resolution or (packed[0].resolution if packed else 256)
    return from_rank_0(lambda: [open_data(path, "", resolution) for path in (first, second)])


def run(
    first: tyro.conf.Positional[Path],
    second: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    data: Path | None = None,
    detector: Path | None = None,
    frame_detector: Path | None = None,
    runs: int = 1,
    seed: int = 0,
    protocol: Protocol = Protocol(),  # noqa: B008
    resolution: int | None = None,
    random_windows: bool = False,
    kernels: Literal["auto", "triton", "reference"] = "auto",
    out: Path | None = None,
):
    """Scores generated clips against real ones: FVD, FID, and how they move.

    Args:
        first: a checkpoint or run; or, before SECOND, the real clips: a folder or zip of videos or
            frames, or a packed folder.
        second: another system's clips, in any of these forms.
        data: the real clips to score a checkpoint against. Default: those it was trained on.
        detector: the TorchScript file of I3D, for FVD. Default: a random network, called proxy.
        frame_detector: the TorchScript file of Inception, for FID. Default: likewise.
        runs: repeat with other latents and other windows of the real clips; gives mean and standard
            deviation.
        seed: of the first run.
        protocol: what else decides the numbers.
        resolution: of two folders of videos, which are center-cropped and packed at it. Default:
            the packed one's, else 256.
        random_windows: of SECOND, too, take a window at random from each clip, not its first
            frames: for real clips.
        kernels: what the ops of kernels/ run as on a GPU: auto is the fastest that agrees with
            plain PyTorch, measured once.
        out: the JSON file. Default: metrics-….json beside the checkpoint; of two folders, in the
            current folder.
    """
    if runs < 1 or not 0 <= seed < 2**30:
        what = f"runs {runs}, seed {seed}"
        raise UserError(f"{what}: runs must be at least 1, the seed from 0 to 2³⁰")
    if second is not None and data is not None:
        raise UserError("give a CHECKPOINT and --data, or two folders of clips, not all of them")
    if second is None and (random_windows or resolution):
        raise UserError(
            "--random-windows and --resolution are for two folders of clips; a checkpoint has its "
            "own"
        )
    distributed.start()
    device = pick_device()
    choose_kernels(kernels, device.type == "cuda", device)
    detectors = open_detectors(detector, frame_detector, device)
    protocol = protocol.chosen(detectors)
    if second is None:
        generator, path, clips = open_checkpoint(first, data, device)
        folder, name = path.parent, path.name
        model = generator.config
        conditions = conditions_of(clips, model.num_labels, model.frame_condition_dim)
    else:
        clips, other = open_two(first, second, resolution)
        folder, name = Path("."), f"{first.resolve().stem}-{second.resolve().stem}"
    scores = []
    for number in range(seed, seed + runs):
        made = (
            GeneratedSet(generator, protocol, number, conditions, clips)
            if second is None
            else ClipSet(other, protocol, number, from_start=not random_windows)
        )
        sets = ClipSet(clips, protocol, number), made
        scores.append(score(*sets, protocol, detectors))
    if not distributed.main():
        return
    results = summarize(scores)
    merged = merge(scores, results)
    told = report(scores, results, merged, sets, protocol, detectors, seed)
    if second is None:
        told["protocol"]["generated"] |= {
            "checkpoint": str(path),
            "sha256": sha256_of(path / "model.safetensors"),
        }
    if out is None:
        key = hashlib.sha256(json.dumps(told["protocol"]).encode()).hexdigest()[:8]
        out = folder / f"metrics-{name}-{key}.json"
    print(protocol_lines(told["protocol"]))
    print(table(results, merged))
    try:
        write_whole(out, json.dumps(told, indent=1) + "\n")
    except OSError as error:
        why = f"{error.strerror}; choose another place with --out"
        raise UserError(f"cannot write {out}: {why}") from None
    print(f"the whole protocol is in {out}")


def main():
    def work():
        tyro.cli(run, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)

    try:
        run_program(work, "interrupted; what is in the cache need not be computed again")
    finally:
        if torch.distributed.is_initialized():
            # not distributed.finish: after an error, nobody waits
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
