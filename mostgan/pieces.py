"""The pieces that a batch is computed in (TrainConfig.batch_split): which are this process's, and
how a phase of a training step is taken on all of them.
"""

import contextlib
import copy

import torch

from mostgan import distributed
from mostgan.device import side_by_side, usable_threads
from mostgan.loss import Clips


def own_pieces(config):
    """The pieces of the batch that are this process's, by number in the whole batch."""
    count = config.batch_split // distributed.size()
    return range(distributed.rank() * count, (distributed.rank() + 1) * count)


def pieces_of(batch, config):
    """This process's share of a batch of real clips, in pieces: a list of Clips."""
    frames, model = batch.frames.float() / 127.5 - 1, config.model
    size = config.batch_clips // config.batch_split
    label = batch.label if model.num_labels else None
    of_frames = batch.frame_condition if model.frame_condition_dim else None
    whole = Clips(frames, batch.t, label, of_frames)
    parts = [[None] * config.batch_split if of is None else of.split(size) for of in whole]
    return [Clips(frames.flatten(0, 1), *rest) for frames, *rest in zip(*parts)]


@contextlib.contextmanager
def each_piece(config, device, networks, stats):
    """Gives a function on_pieces(of_piece, *inputs) that takes a phase on every piece of this
    process.

    of_piece(number, *networks, *its inputs) adds to the networks' gradients and returns a dict of
    values for `stats`, and more; inputs: a list each, with an entry per piece. The gradients of all
    pieces are in `networks` then. Returns what of_piece gave beside the dict, each as a tuple.

    A GPU, or a compiled step, takes one piece after the other. The cores of a CPU take them side by
    side, each with a twin of the networks, whose gradients are then added in the pieces' order: so
    the bits are the same, but for OpenMP's threads, of which a piece has its share.
    """
    pieces = own_pieces(config)
    at_once = min(usable_threads(), len(pieces))
    if device.type != "cpu" or config.compile:
        at_once = 1
    of_pieces = [
        [network, *(twin_of(network) if at_once > 1 else network for _ in pieces[1:])]
        for network in networks
    ]

    def on_pieces(of_piece, *inputs):
        results = []
        for seen, *result in map_pieces(of_piece, pieces, *of_pieces, *inputs):
            stats.add(**seen)
            results.append(result)
        for copies in of_pieces:
            add_gradients(copies)
        return zip(*results)

    with side_by_side(at_once) as map_pieces:
        yield on_pieces


def twin_of(network):
    """The network once more, in the same memory, with parameters and gradients of its own; for as
    long as nobody gives the parameters other memory.

    Threads that build graphs on the same parameters stand still now and then: in PyTorch 2.13 one
    holds a parameter's lock and waits for Python's, while another holds that and waits for the
    first (torch::autograd::impl::grad_accumulator, AutogradMeta::fw_grad).
    """
    same_memory = {id(p): torch.nn.Parameter(p.detach()) for p in network.parameters()}
    same_memory |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    return copy.deepcopy(network, same_memory)


@torch.no_grad()
def add_gradients(networks):
    """Adds the gradients of twins, in their order, to those of the first network."""
    first, *others = networks
    for twin in others:
        if twin is first:  # its pieces' gradients have added up by themselves
            continue
        pairs = zip(first.parameters(), twin.parameters())
        pairs = [(mine.grad, other.grad) for mine, other in pairs if other.grad is not None]
        if pairs:  # those of the phase's network
            torch._foreach_add_([mine for mine, _ in pairs], [other for _, other in pairs])
        twin.zero_grad(set_to_none=True)
