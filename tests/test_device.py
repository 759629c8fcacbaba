"""Frames on their way from a GPU to the host (mostgan/device.py), with a stand-in for the GPU's
streams.
"""

import contextlib
from concurrent.futures import Future

import pytest
import torch

from mostgan import device
from mostgan.device import in_order, to_host


class Stream:
    """Copies that run late: only when somebody waits for them."""

    def __init__(self, log):
        self.log, self.event = log, lambda: None

    def wait_stream(self, other):
        self.log.append("wait for rendering")

    def record_event(self):
        return self

    def synchronize(self):
        self.log.append("wait for copy")


@pytest.fixture
def fake_cuda(monkeypatch):
    log, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options)
    )
    return log


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_window_arrives_once_and_in_order(fake_cuda, count):
    windows = [torch.full((2, 3 if i < 4 else 1), i) for i in range(count)]
    arrived = list(to_host(iter(windows), torch.device("cuda")))
    assert len(arrived) == count and all(map(torch.equal, arrived, windows))


def test_the_next_window_is_started_before_the_last_is_waited_for(fake_cuda):
    def render():
        for i in range(3):
            fake_cuda.append(f"render {i}")
            yield torch.tensor([i])

    for window in to_host(render(), torch.device("cuda")):
        fake_cuda.append(f"encode {int(window)}")
    assert [line for line in fake_cuda if line != "wait for rendering"] == [
        "render 0",
        "render 1",
        "wait for copy",
        "encode 0",
        "render 2",
        "wait for copy",
        "encode 1",
        "wait for copy",
        "encode 2",
    ]


def test_on_a_cpu_nothing_is_copied():
    window = torch.zeros(3)
    assert next(to_host(iter([window]), torch.device("cpu"))) is window


def test_threads_follow_what_the_process_may_use(monkeypatch):
    """Unless the environment says how many."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    device.pick_device()
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    device.pick_device()
    assert asked == [3]


def test_results_come_in_order_and_few_wait():
    begun = []

    def submit(number):
        begun.append(number)
        future = Future()
        future.set_result(number)
        return future

    for number in in_order(submit, ((i,) for i in range(9)), 2):
        assert len(begun) <= number + 3
    assert begun == list(range(9)) and number == 8
