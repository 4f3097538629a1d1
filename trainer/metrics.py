"""The numbers of a run: metrics.jsonl, and what the machine says of itself."""

import contextlib
import json
import logging
import os
import resource
import sys
from pathlib import Path

import torch

log = logging.getLogger(__name__)

Record = dict[str, float | int | None]

# Dense bf16 matrix FLOP/s from the vendors' data sheets; the first key found in the name counts.
_PEAKS = {
    "B300": 2250e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "MI355X": 2500e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's matrix FLOP/s; None where it is not known, as for every CPU and for fp32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on CUDA, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    # Not getrusage: its maximum starts from that of the process which launched this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


class MetricsFile:
    """metrics.jsonl: one line per optimiser step, each written at once.

    A step that is not ahead of the last one cuts the lines from it on: the run went back. Lines
    that cannot be written, as on a full disk, wait for the next one.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Keeps the lines up to `last_step`, cuts the others and what a crash left half-written."""
        self._path, self._step = path, last_step
        self._waiting: dict[int, bytes] = {}  # by step
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_intact_bytes(path, last_step))

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        if step <= self._step:
            self._waiting = {s: line for s, line in self._waiting.items() if s < step}
            self._file.truncate(_intact_bytes(self._path, step - 1))
        self._step = step
        self._waiting[step] = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._write()

    def close(self) -> None:
        self._write()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()

    def _write(self) -> None:
        lines = b"".join(self._waiting.values())
        size = os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError as error:
            self._file.truncate(size)
            if len(self._waiting) == 1:
                log.warning("%s: %s; its lines wait from step %d on", self._path, error, self._step)
        else:
            self._waiting.clear()


def _intact_bytes(path: Path, last_step: int) -> int:
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                intact = line.endswith(b"\n") and json.loads(line)["step"] <= last_step
            except (ValueError, KeyError, TypeError):
                intact = False
            if not intact:
                break
            size += len(line)
    return size
