"""The pieces that a batch is computed in (TrainConfig.batch_split): which are this process's, and
how a phase of a training step is taken on all of them.
"""

import atexit
import contextlib
import multiprocessing
import pickle
import signal
import traceback
from multiprocessing import resource_tracker

import numpy as np
import torch

from mostgan import distributed
from mostgan.config import UserError
from mostgan.device import make_deterministic, pick_device, usable_threads
from mostgan.loss import Clips


def own_pieces(config):
    """The pieces of the batch that are this process's, by number in the whole batch."""
    count = config.batch_split // distributed.size()
    return range(distributed.rank() * count, (distributed.rank() + 1) * count)


def pieces_of(batch, config):
    """This process's share of a batch of real clips, in pieces: a list of Clips."""
    model, size = config.model, config.batch_clips // config.batch_split
    label = batch.label if model.num_labels else None
    of_frames = batch.frame_condition if model.frame_condition_dim else None
    whole = Clips(batch.frames, batch.t, label, of_frames)
    parts = [[None] * config.batch_split if of is None else of.split(size) for of in whole]
    # Frames of a piece have memory of their own: what is sent to a process is that memory.
    return [Clips(frames.flatten(0, 1).float() / 127.5 - 1, *rest) for frames, *rest in zip(*parts)]


def processes_of(config, device):
    """How many processes take this process's pieces side by side."""
    if device.type != "cpu" or config.compile:
        return 1
    return min(usable_threads(), len(own_pieces(config)))


@contextlib.contextmanager
def each_piece(config, device, phases, networks, stats):
    """Gives a function on_pieces(phase, *inputs) that takes a phase on every piece of this process.

    phases: picklable; its method `phase`(*networks, *inputs of the piece) adds to the gradients of
    one network, and returns a dict of values for `stats`, and more. inputs: a list each, with an
    entry per piece. The gradients of all pieces are in `networks` then. Returns what the method
    gave beside the dict, each as a tuple.

    A GPU, or a compiled step, takes one piece after the other. The cores of a CPU take them side by
    side, in processes that share the networks' memory: threads would wait for Python's lock at
    every small operation. Gradients are added in the pieces' order, and a piece has its share of
    the threads wherever it is taken, so the bits are the same.
    """
    pieces, at_once = np.arange(len(own_pieces(config))), processes_of(config, device)
    threads = usable_threads() // at_once
    # This process's pieces are the first, whose gradients add up by themselves.
    own, *others = np.array_split(pieces, at_once)
    buffers = shared_memory(networks, len(pieces) - len(own)) if others else None
    if others and buffers is None:
        own, others = pieces, []
    with contextlib.ExitStack() as stack:
        helpers = []
        for share in others:
            gradients = [buffers[piece - len(own)] for piece in share]
            helpers.append(stack.enter_context(Helper(phases, networks, gradients, threads)))

        def on_pieces(phase, *inputs):
            work, method = list(zip(*inputs)), getattr(phases, phase)
            for helper, share in zip(helpers, others):
                helper.begin(phase, [work[piece] for piece in share])
            with openmp_threads(threads):
                results = [method(*networks, *work[piece]) for piece in own]
            for helper in helpers:
                results += helper.finish()
            for seen, *_ in results:
                stats.add(**seen)
            return zip(*(rest for _, *rest in results))

        yield on_pieces


def shared_memory(networks, pieces):
    """Moves the networks to memory that processes can share. Returns buffers there for the
    gradients of one network for each of so many pieces; None, with a warning, where that fails.
    """
    try:
        for network in networks:
            network.share_memory()
        size = max(sum(p.numel() for p in network.parameters()) for network in networks)
        return list(torch.zeros(pieces, size).share_memory_())
    except RuntimeError as error:
        distributed.say(
            "warning: processes cannot share memory here, so the pieces of a batch are taken one "
            f"after the other; a container may need more of it (--shm-size): {error}"
        )
        return None


@contextlib.contextmanager
def openmp_threads(count):
    """Has PyTorch share an operation between so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Helper:
    """A process that takes some of the pieces, with a buffer for the gradients of each.

    It ends with this process, however that ends, and takes no notice of the signals of a job or a
    terminal: those are for this process, which needs the helper to finish its step.
    """

    def __init__(self, phases, networks, gradients, threads):
        self.networks, self.gradients = networks, gradients
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        self.connection, theirs = spawn.Pipe()
        deterministic = torch.are_deterministic_algorithms_enabled()
        args = theirs, phases, networks, gradients, threads, deterministic
        self.process = spawn.Process(target=_help, args=args, daemon=True)
        resource_tracker.ensure_running()  # which unblocks signals
        # A new process inherits which signals are blocked.
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            with self._alive():
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        # Before multiprocessing's own end, which would send it a signal that it does not notice.
        atexit.register(self.process.kill)

    def begin(self, phase, work):
        """Hand over a phase, and what it takes of each piece."""
        with self._alive():
            _send(self.connection, (phase, work))

    def finish(self):
        """The results of each piece, in order, whose gradients are added to the networks' own."""
        with self._alive():
            results, error, trace = _receive(self.connection)
        if error is not None:
            raise error from RuntimeError(f"in a process that takes a part of the batch:\n{trace}")
        mine = gradients_of(self.networks)
        for buffer in self.gradients:
            torch._foreach_add_(mine, split_as(buffer, mine))
        return results

    @contextlib.contextmanager
    def _alive(self):
        try:
            yield
        except (EOFError, OSError):
            raise UserError(
                "a process that takes a part of each batch died (killed, or short of memory): go "
                "on with --resume, if need be with OMP_NUM_THREADS=1 before it, for one process; a "
                "script of your own that trains needs `if __name__ == '__main__':` around it"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        atexit.unregister(self.process.kill)
        self.connection.close()
        self.process.kill()  # nothing in it is to be saved
        self.process.join()


def _help(connection, phases, networks, gradients, threads, deterministic):
    """What a helper does, until the process that started it is gone."""
    pick_device()
    if deterministic:
        make_deterministic()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            phase, work = _receive(connection)
            outcome = _outcome(getattr(phases, phase), networks, work, gradients)
            try:
                _send(connection, outcome)
            except (pickle.PicklingError, TypeError, AttributeError):  # of an error
                _send(connection, (None, RuntimeError(str(outcome[1])), outcome[2]))


def _outcome(method, networks, work, gradients):
    """Results of each piece, whose gradients are in the buffers then; or the error, and where."""
    results = []
    try:
        for inputs, buffer in zip(work, gradients):
            results.append(method(*networks, *inputs))
            of_piece = gradients_of(networks)
            torch._foreach_copy_(split_as(buffer, of_piece), of_piece)
            for network in networks:
                network.zero_grad(set_to_none=True)
    except Exception as error:
        return None, error, traceback.format_exc()
    return results, None, None


def gradients_of(networks):
    """All gradients that there are: the same ones for every piece."""
    return [p.grad for network in networks for p in network.parameters() if p.grad is not None]


def split_as(flat, tensors):
    """The beginning of a flat tensor, as views with the shapes of `tensors`."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def _send(connection, message):
    # By pickle alone: a connection would put each tensor in shared memory, which takes longer.
    connection.send_bytes(pickle.dumps(message))


def _receive(connection):
    return pickle.loads(connection.recv_bytes())
