"""What each rank runs on: versions, and the variables that change how it computes or talks."""

import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("flash-attn", "flash-linear-attention", "triton", "deepspeed", "accelerate")
PREFIXES = ("NCCL_", "TORCH_", "PYTORCH_", "CUDA_", "GLOO_", "OMP_")
VARIABLES = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
)
OWN = ("CUDA_VISIBLE_DEVICES",)  # nodes that are shared give other devices to each job


def host() -> str:
    """Slurm's name of the node, where there is one: several may run on a machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def versions(device: torch.device) -> dict[str, str]:
    """Of all that a message or a kernel depends on; only what is there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _driver() or "unknown"
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of the libraries below us; none that could hold a secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(PREFIXES) or name in VARIABLES
    }


def differences(facts: Sequence[Mapping[str, str]], places: Sequence[str]) -> list[str]:
    """A line for each key and value that is not what most ranks have.

    facts, places: by rank, what it found and where it is.
    """
    lines = []
    for key in sorted({key for own in facts for key in own} - set(OWN)):
        values = [own.get(key, "missing") for own in facts]
        usual = Counter(values).most_common(1)[0][0]
        for value in sorted(set(values) - {usual}):
            where = [place for place, own in zip(places, values, strict=True) if own == value]
            lines.append(f"{key} is {value} on {', '.join(where)}; elsewhere {usual}")
    return lines


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text()) if path.exists() else None
    return match[0] if match else None
