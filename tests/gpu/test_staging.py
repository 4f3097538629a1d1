"""Copies of a state on a device into pinned host memory, beside the kernels of the next step."""

import threading

import pytest
import torch

from trainer.checkpoint.staging import HostBuffers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_copies_hold_what_was_queued_before_the_mark():
    buffers = HostBuffers()
    x = torch.zeros(2**24, device="cuda")
    pointers = set()
    for start in (0, 10):
        for _ in range(10):
            x += 1  # still queued when the save begins
        buffers.mark()
        copied = []
        state = {"model": {"x": x, "step": torch.tensor(float(start))}}
        thread = threading.Thread(target=lambda s=state, c=copied: c.append(buffers.copy(s)))
        thread.start()
        thread.join()
        x.add_(0)  # the next step may write now
        held = copied[0]["model"]
        assert held["x"].is_pinned() and held["x"].eq(start + 10).all()
        assert held["step"] == start
        pointers.add(held["x"].data_ptr())
    assert len(pointers) == 1
