"""Faults of a training run: losses and gradients that are not finite, memory that does not
suffice.
"""

from contextlib import contextmanager

import torch

from mostgan import distributed
from mostgan.config import UserError


class Skips:
    """Optimizer steps left out because a loss or a gradient was not finite, per phase ("G", "D",
    "R1").

    All of it stays on the device: nothing waits for it until `check`.
    """

    def __init__(self):
        self.phases = {}

    @torch.no_grad()
    def count(self, phase, loss, parameters):
        """Whether to leave out the step, a float tensor, 1 or 0: `loss`, or a gradient of
        `parameters`, is not finite.

        loss: float tensor []; parameters: those of an optimizer, with gradients or None. The
        maximum norm cannot overflow as the Euclidean one can, and keeps NaN.
        """
        of = [p for p in parameters if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in of], ord=float("inf"))
        broken = ~torch.stack([loss.abs(), *norms]).isfinite()
        skip, zero = broken.any(), torch.zeros((), dtype=torch.int64, device=loss.device)
        start = {
            "in_a_row": zero,
            "longest": zero,
            "loss": loss,
            "broken": broken,
            "parameters": of,
        }
        seen = self.phases.setdefault(phase, start)
        seen["in_a_row"] = (seen["in_a_row"] + 1) * skip
        seen["longest"] = torch.maximum(seen["longest"], seen["in_a_row"])
        seen["loss"] = torch.where(skip, loss, seen["loss"])
        seen["broken"] = torch.where(skip, broken, seen["broken"])
        return skip.float()

    def check(self, limit, modules, step, saver):
        """UserError with a diagnosis if more than `limit` steps of a phase in a row were left out.

        modules: phase → the module whose parameters `count` was given; saver: it knows the last
        good checkpoint.
        """
        for phase, seen in self.phases.items():
            if int(seen["longest"]) <= limit:
                continue
            names = {id(p): name for name, p in modules[phase].named_parameters()}
            broken = [
                names[id(p)]
                for p, bad in zip(seen["parameters"], seen["broken"].tolist()[1:])
                if bad
            ]
            saver.finish()
            shown = (
                ": " + ", ".join(broken[:4]) + (", …" if len(broken) > 4 else "") if broken else ""
            )
            raise UserError(
                f"stopped near step {step}: {int(seen['longest'])} steps of {phase} in a row were "
                "not finite; the last "
                f"had the loss {float(seen['loss']):g} and gradients that are not finite in "
                f"{len(broken)} of "
                f"{len(seen['parameters'])} parameters{shown}; "
                + (
                    f"the last good checkpoint is {saver.saved}: go on from it"
                    if saver.saved
                    else "start again"
                )
                + " with lower learning rates or --precision float32"
            )


@contextmanager
def memory_advice(config, run):
    """Turns running out of GPU memory into a UserError that names the next larger batch_split that
    is possible.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        clips, group, processes = config.batch_clips, config.model.mbstd_group, distributed.size()
        pieces = {
            split: clips // split
            for split in range(config.batch_split + 1, clips + 1)
            if clips % split == 0 and split % processes == 0
        }
        split = next(
            (split for split, piece in pieces.items() if piece % min(group, piece) == 0), None
        )
        if split:
            again = f"go on with: {distributed.resume_command(run)} --batch-split {split}"
        else:
            again = f"no larger --batch-split is possible than {config.batch_split}: "
            again += "start with a smaller model"
        raise UserError(
            f"out of GPU memory with {clips // config.batch_split} clips at a time; {again}"
        ) from None
