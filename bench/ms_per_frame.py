"""ms per generated frame at the paper's 256² configuration, and the arithmetic rate as a fraction of a matmul's.

    python bench/ms_per_frame.py [--frames 16] [--repeats 5] [--out results.json]

A frame is 30.8 GFLOP (spec §11: twice the multiply-adds of convolutions and matrix products). The matmul is a 2048³
float32 one in the same run, so that the fraction does not depend on how fast the machine is today. Weights are random:
speed does not depend on them. The last line is a video of four such windows from the first latent to the finished mp4,
as sample.py writes it, beside the same rendering without writing.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from mostgan.config import ModelConfig
from mostgan.device import peak_memory_mb, pick_device
from mostgan.model import Generator
from mostgan.video_writer import BackgroundWriter, VideoWriter

GFLOP_PER_FRAME = 30.8
MATMUL = 2048


def seconds(run, device, repeats):
    """Median seconds of run() over repeats, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def end_to_end(generator, frames, window, repeats):
    """Median seconds of a video of one clip: (rendered only, to a finished mp4, of which encoding), taken in turn."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for picture in generator.render(seed=0, frames=frames, window=window):
            picture.cpu()
        rendered = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            with BackgroundWriter(VideoWriter(Path(folder, "sample.mp4"), 25)) as video:
                for picture in generator.render(seed=0, frames=frames, window=window):
                    video.write(picture[0].cpu())
            times.append((rendered - started, time.perf_counter() - rendered, video.seconds))
    return [statistics.median(column) for column in zip(*times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, help="frames of one clip in a window (default 16)")
    parser.add_argument("--repeats", type=int, default=5, help="windows timed, of which the median counts (default 5)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    device = pick_device()
    torch.manual_seed(0)
    generator = Generator(ModelConfig()).to(device).eval().requires_grad_(False)
    a, b = torch.randn(2, MATMUL, MATMUL, device=device)

    def window():
        for _ in generator.render(seed=0, frames=args.frames, window=args.frames):
            pass

    # The matmul is timed before and after: a shared machine's clock may change in between.
    before = seconds(lambda: a @ b, device, args.repeats)
    per_frame = seconds(window, device, args.repeats) / args.frames
    after = seconds(lambda: a @ b, device, args.repeats)
    matmul_rate = 2 * MATMUL**3 / ((before + after) / 2) / 1e9
    rate = GFLOP_PER_FRAME / per_frame
    length = 4 * args.frames
    render_only, to_mp4, encoding = end_to_end(generator, length, args.frames, args.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "device": name, "torch": torch.__version__, "python": platform.python_version(), "date": str(date.today()),
        "resolution": 256, "frames_per_window": args.frames, "ms_per_frame": round(per_frame * 1e3, 2),
        "gflop_per_s": round(rate, 1), "matmul_gflop_per_s": round(matmul_rate, 1),
        "fraction_of_matmul_rate": round(rate / matmul_rate, 3), "peak_memory_mb": round(peak_memory_mb(device)),
        "video_frames": length, "render_fps": round(length / render_only, 2), "mp4_fps": round(length / to_mp4, 2),
        "encoding_ms_per_frame": round(encoding / length * 1e3, 2),
    }
    print(f"MoStGAN-V 256², {args.frames} frames of one clip a window, float32, {name}, torch {torch.__version__}")
    print(f"{result['ms_per_frame']} ms/frame, {result['gflop_per_s']} GFLOP/s, peak {result['peak_memory_mb']} MB")
    print(f"2048³ matmul: {result['matmul_gflop_per_s']} GFLOP/s")
    print(f"{length} frames to a finished mp4: {result['mp4_fps']} frames/s, rendering alone {result['render_fps']}, "
          f"encoding beside it {result['encoding_ms_per_frame']} ms/frame")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"fraction of matmul rate: {rate / matmul_rate:.2f}")


if __name__ == "__main__":
    main()
