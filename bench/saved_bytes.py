"""Bytes that the compiled objectives of a training step keep for the backward pass, and their graph
breaks.

    python bench/saved_bytes.py [--ops] [--clips 4] [--out FILE]

At 256² with a quarter of the paper's channels, on a CPU, with torch.compile's aot_eager backend:
counted by autograd's saved-tensor hooks, each storage once, parameters and inputs left out. --ops
takes the registered ops (their plain twins, on a CPU), as on a GPU; without it the ops are plain
PyTorch that the compiler sees through.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

# Before this folder, whose kernels.py is not the package `kernels`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.timing import do_without, write

do_without("av", "PIL", "tqdm", "tyro")

import train as training
from mostgan.config import train_preset
from mostgan.draws import latents_of_piece, random_stream, transforms_of_piece
from mostgan.loss import (
    Clips,
    discriminator_objective,
    frozen,
    generator_objective,
    r1_objective,
)

CLIPS = SimpleNamespace(lengths=np.full(100, 200), labels=None)


def kept(run, given):
    """Bytes of the storages that run() saves for its gradient, but those of `given`."""
    known, sizes = {t.untyped_storage().data_ptr() for t in given}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # stays until the end: an address must not be used twice
    del result
    return sum(sizes.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", action="store_true")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.ops:
        from kernels import choose

        choose.devices = {"cuda", "cpu"}
        choose.Op.__call__ = lambda op, *inputs: op.twin(*inputs)
    config = train_preset("paper256", "sky")
    model = dataclasses.replace(config.model, channel_base=4096, channel_max=128)
    config = dataclasses.replace(
        config, model=model, batch_clips=args.clips, batch_split=1, precision="float32"
    )
    device = torch.device("cpu")
    state, rng = training.new_state(config, device), random_stream(0, 0, "G", 0)
    B, T, R = args.clips, model.frames_per_clip, model.resolution
    t = torch.arange(T, dtype=torch.float64).expand(B, T) * 3
    real, fake = (Clips(torch.randn(B * T, 3, R, R), t, None) for _ in ("real", "fake"))
    transforms = [transforms_of_piece(config, device, rng, 0.4) for _ in range(2)]
    latents, G, D = latents_of_piece(config, CLIPS, device, rng), state.G, state.D
    of_generator, of_discriminator, of_r1 = (
        torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")
        for objective in (generator_objective, discriminator_objective, r1_objective)
    )
    runs = {
        "generator": lambda: of_generator(G, frozen(D), latents, transforms[0], 0.1),
        "discriminator": lambda: of_discriminator(D, real, transforms[0], fake, transforms[1]),
        "r1": lambda: of_r1(D, real, transforms[0]),
    }
    given = [
        *G.parameters(),
        *D.parameters(),
        *(v for v in (*real, *fake, *latents) if v is not None),
    ]
    result = {"ops": args.ops, "clips": B, "torch": torch.__version__, "rows": []}
    for name, run in runs.items():
        run()  # compiles, which hooks would be in the way of
        size = kept(run, given)
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        result["rows"].append({"objective": name, "bytes": size, "graph_breaks": breaks})
        print(f"{name:14} {size / 1e6:8.1f} MB kept, {breaks} graph breaks", flush=True)
        write(args.out, result)


if __name__ == "__main__":
    main()
