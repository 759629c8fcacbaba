"""Several processes, one per GPU, as torchrun starts them. With one process, everything here does
nothing.

The batch is global and computed in pieces (TrainConfig.batch_split), each of them whole by one
process: rank r takes the r-th share of the pieces. What couples the clips of a batch, minibatch
groups and the diversity loss's Gram matrix, stays within a piece, and a piece's random stream is
keyed by its number; so N processes compute what one computes, but for the order in which the
pieces' gradients are added.

Gradients are not reduced by DistributedDataParallel: its hooks sit on a module's forward and on
gradient accumulation, which R1 inside a compiled function (torch.func.grad) goes around, and with
several pieces they would fire for each. Instead `sum_` adds up a phase's gradients in one
collective just before its optimizer's step.
"""

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from mostgan.config import UserError

PATIENCE = timedelta(days=2)  # for one process to pack the data, while the others wait


def start():
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), or do nothing.
    UserError: too few GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"too few GPUs for --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}: there are "
                f"{gpus}"
            )
        torch.cuda.set_device(local)
        # gloo is for what the host must know (any_of).
        dist.init_process_group("cpu:gloo,cuda:nccl", **_new_store())
    else:
        dist.init_process_group("gloo", **_new_store())


def _new_store():
    """A store, by which processes find each other, of this start's own, hosted by rank 0:
    init_process_group's options.

    After a restart torchrun's store still holds the addresses of the dead processes, and a living
    one that is quicker than its peers would call those. Here the worst that it finds is a port
    where nobody answers, and it looks again.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    torchruns = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        torchruns.set("mostgan/port", str(store.port))
    else:
        store = dist.TCPStore(host, _answering_port(host, torchruns), is_master=False)
    return {"store": store, "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}


def _answering_port(host, torchruns):
    deadline = time.monotonic() + 300
    while True:
        port = int(torchruns.get("mostgan/port"))
        try:
            socket.create_connection((host, port), timeout=2).close()
            return port
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(f"rank 0 on {host} cannot be reached at port {port}") from None
            time.sleep(0.1)


def finish():
    """Leave, when every process has come this far."""
    if dist.is_initialized():
        any_of(False)
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def main():
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def say(text):
    """Print, once."""
    if main():
        print(text, flush=True)


def restarted():
    """Whether torchrun started this again after a failure (--max-restarts): the same command, to be
    gone on with.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch():
    """A name for the torchrun that started this process, the same after its restarts; None without
    torchrun.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} on {socket.gethostname()}, process {os.getppid()}"


def resume_command(run):
    """The command that goes on with a run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = f" --nnodes={size() // local}" if size() > local else ""
    with_torchrun = f"torchrun{nodes} --nproc_per_node={local}" if launch() else "python"
    return f"{with_torchrun} train.py --resume {run}"


@torch.no_grad()
def sum_(tensors):
    """Replace tensors, of one dtype and device, by their sums over all processes; one collective
    for all of them.
    """
    if size() > 1:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(
            tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
        )


def any_of(*flags):
    """Each flag, set if it is set anywhere. On the host, so that a GPU's queue runs on; every
    process must call it.
    """
    if size() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def from_main(text):
    """The text that the main process gives; the others' is ignored."""
    if size() == 1:
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    dist.broadcast(length, 0)
    data = data if main() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


def in_turn(function):
    """function() of each process: the first process's, then one on every other node, then the rest.

    So what the first makes on disk, packed data, the others find.
    """
    if size() == 1:
        return function()
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    mine = 0 if main() else 1 if int(os.environ["LOCAL_RANK"]) == 0 else 2
    for turn in range(3):
        if turn == mine:
            result = function()
        dist.barrier(patient)
    dist.destroy_process_group(patient)
    return result
