"""metrics.jsonl over crashes and resumptions, and what the machine says of itself."""

import json

import pytest
import torch

from tests.helpers import full_disk
from trainer.metrics import MetricsFile, peak_flops, peak_memory_gib


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, last_step=0)
    loss = 0.1 + 0.2
    file.log({"step": 1, "loss": loss, "mfu": None})
    assert lines(path) == [{"step": 1, "loss": loss, "mfu": None}]
    with pytest.raises(ValueError):
        file.log({"step": 2, "loss": float("nan")})


@pytest.mark.parametrize("tail", [b"", b'{"step": 5, "lo', b"\x00\x00\n", b'{"step": 3}'])
@pytest.mark.parametrize("last", [0, 2, 3, 9])
def test_resuming_cuts_later_lines_and_torn_tails(tmp_path, last, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step": %d}\n' % s for s in (1, 2, 3, 4)) + tail)
    file = MetricsFile(path, last_step=last)
    kept = min(last, 4)
    file.log({"step": kept + 1})
    file.close()
    assert [line["step"] for line in lines(path)] == list(range(1, kept + 2))


def test_lines_wait_while_the_disk_is_full(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, last_step=0)
    file.log({"step": 1})
    with full_disk(path.stat().st_size + 5):
        for step in (2, 3, 4, 3):  # went back
            file.log({"step": step})
        assert path.read_bytes() == b'{"step": 1}\n'
    file.log({"step": 4, "loss": 0.5})
    file.close()
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": 0.5}]
    assert [record.message.partition("; ")[2] for record in caplog.records] == [
        "its lines wait from step 2 on"
    ]


def test_what_a_cpu_says_of_itself():
    held = torch.ones(2**24)  # 64 MiB
    assert peak_memory_gib(torch.device("cpu")) > 2 * held.numel() * 4 / 2**30
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA H200", 989e12), ("NVIDIA H20", 148e12), ("NVIDIA L4", 121e12), ("Unheard of", None)],
)  # fmt: skip
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "fp32") is None
