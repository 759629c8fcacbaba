"""The state of a training run: what a checkpoint keeps of it, and saving it as training goes on."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mostgan import checkpoint, distributed
from mostgan.config import UserError
from mostgan.discriminator import Discriminator
from mostgan.model import Generator

RETRY_SECONDS = 60  # until the next try after a save that failed
LAST_TRIES, LAST_RETRY_SECONDS = 3, 5  # of the last save of a run, which nothing comes after


@dataclass
class State:
    """All that a resumed run needs. Only the training loop changes it. Random numbers need no
    state: each step has streams keyed by (seed, step).
    """

    G: Generator
    D: torch.nn.Module
    ema: Generator
    adam_G: torch.optim.Optimizer
    adam_D: torch.optim.Optimizer
    step: int = 0  # also the loader's position
    frames: int = 0
    seconds: float = 0.0
    ada_p: float = 0.0
    ada_sign: float = 0.0  # sum over steps of mean sign(D(real)), since ADA's last adjustment


def snapshot(state):
    """Copies on the host: (averaged generator's tensors, all other tensors, JSON values), as
    checkpoint.save takes.
    """
    tensors = {}
    for name in ("G", "D"):
        for key, value in getattr(state, name).state_dict().items():
            tensors[f"{name}.{key}"] = value
        for i, moments in getattr(state, f"adam_{name}").state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"adam_{name}.{i}.{key}"] = value
    scalars = {key: getattr(state, key) for key in ("step", "frames", "seconds", "ada_p")}
    scalars["ada_sign"] = float(state.ada_sign)
    return _on_host(state.ema.state_dict()), _on_host(tensors), scalars


def _on_host(tensors):
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def load_state(state, path):
    """Continue from the checkpoint at path. Raises UserError if it does not fit."""
    tensors, scalars = checkpoint.read_training(path)
    checkpoint.load_state(state.ema, checkpoint.read_tensors(path / "model.safetensors"), path)
    for name in ("G", "D"):
        checkpoint.load_state(getattr(state, name), checkpoint.part(tensors, name), path)
        adam, moments = getattr(state, f"adam_{name}"), {}
        for key, value in checkpoint.part(tensors, f"adam_{name}").items():
            i, moment = key.split(".")
            moments.setdefault(int(i), {})[moment] = value
        adam.load_state_dict(adam.state_dict() | {"state": moments})
    for key, value in scalars.items():
        setattr(state, key, value)


def start_from(state, path):
    """Take the networks of a checkpoint that it has of G, D and the average; Adam and all counts
    start anew.

    A generator that is not there starts as the average. Returns a line on what was taken. Raises
    UserError, naming the fields of the configuration that fit no tensor.
    """
    path, model = checkpoint.find(path), state.G.config
    states = checkpoint.read_networks(path)
    wrong = [] if _fits(model, states) else _misfits(model, checkpoint.read_config(path), states)
    if wrong:
        raise UserError(
            f"{path} has no tensors for {', '.join(wrong)}: leave that out, or train a new model"
        )
    checkpoint.load_state(state.ema, states["ema"], path)
    checkpoint.load_state(state.G, states.get("G", states["ema"]), path)
    if "D" in states:
        checkpoint.load_state(state.D, states["D"], path)
    last, judge = "its generator", "its discriminator"
    if "G" not in states:
        last = "the generator from its average, for it has no other"
    if "D" not in states:
        judge = "a new discriminator, for it has none"
    return f"starts from {path}: its average, {last}, {judge}"


def _fits(config, states):
    """Whether the networks of a configuration have tensors of the same names and shapes."""
    with torch.device("meta"):
        G, D = Generator(config).state_dict(), Discriminator(config).state_dict()
    expected = {"ema": G, "G": G, "D": D}
    return all(_shapes(state) == _shapes(expected[name]) for name, state in states.items())


def _shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


def _misfits(config, stored, states):
    """Which fields of config, other than those of the checkpoint, change shapes: 'rank 3 (it has
    1)', …
    """
    found = []
    for field in dataclasses.fields(config):
        wanted, has = getattr(config, field.name), getattr(stored, field.name)
        try:
            changed = dataclasses.replace(stored, **{field.name: wanted})
            alone = wanted == has or _fits(changed, states)
        except UserError:  # a field that goes with another, such as motion_code_dim
            alone = False
        if not alone:
            found.append(f"{field.name} {wanted} (it has {has})")
    return found or ["its own configuration"]


class Saver:
    """Saves checkpoints of a run: the state is copied to the host at once, and written by a thread,
    one at a time.

    A save that fails is said (by `say`) and tried again later; the checkpoints before it stay.
    saved: the newest checkpoint known to be whole, or None. Only the main process saves. The thread
    ends when `last` has returned.
    """

    def __init__(self, run, saved, minutes, keep, say):
        self.run, self.saved, self.keep, self.say = run, saved, keep, say
        self.seconds = minutes * 60
        self.thread, self.pending, self.failed = ThreadPoolExecutor(1), None, False
        self.next = time.monotonic() + self.seconds

    def due(self):
        """Whether it is time to save: so many minutes after the last time, sooner after a
        failure.
        """
        if self.pending is not None and self.pending.done():
            self.finish()
        return distributed.main() and self.pending is None and time.monotonic() >= self.next

    def start(self, state, metric=None):
        """Save the state as it is now; waits only for the save before it. metric: see
        checkpoint.mark_best.
        """
        if distributed.main():
            self.finish()
            self.next = time.monotonic() + self.seconds
            of_step = state.step, state.ema.config, *snapshot(state)
            self.pending = self.thread.submit(self._write, of_step, metric)

    def _write(self, of_step, metric):
        _, _, model, tensors, _ = of_step
        for name, value in (model | tensors).items():
            if not value.isfinite().all():  # not to be kept in a good checkpoint's place
                raise OSError(f"the state is not finite ({name})")
        return checkpoint.save(self.run, *of_step, self.keep, metric)

    def finish(self):
        """Wait for the save that is under way. Returns whether the last one succeeded."""
        if self.pending is not None:
            try:
                self.saved, self.failed = self.pending.result(), False
            except OSError as error:
                self.failed, self.next = True, time.monotonic() + min(self.seconds, RETRY_SECONDS)
                self.say(
                    f"warning: could not save: {error}; training goes on and tries again later; "
                    f"the last checkpoint is {self.saved}"
                )
            self.pending = None
        return not self.failed

    def last(self, state):
        """Save for the last time. Raises UserError if that fails, several times."""
        for _ in range(LAST_TRIES):
            if self.finish():
                self.thread.shutdown()
                return
            time.sleep(LAST_RETRY_SECONDS)
            self.start(state)
        if not self.finish():
            raise UserError(
                f"could not save step {state.step} in {self.run}; its last checkpoint is "
                f"{self.saved}: make room and go on with: python train.py --resume {self.run}"
            )
