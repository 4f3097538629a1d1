"""What all ranks of a run must have alike, compared before the first message depends on it.

Every rank reads its own command line and files, plans its own batches and layouts, and takes the
same steps by itself. A node with other values would leave the rest waiting for messages that never
come, or train on other documents without a word.
"""

from collections.abc import Mapping
from typing import Any

from parallel.collectives import gather_objects
from parallel.mesh import Mesh
from trainer.errors import ConfigError

# May name files that lie elsewhere on another node, or concern the main process only.
_OWN = ("data", "init_from", "logging", "run_dir")


def check_agreement(config: Mapping[str, Any], data: Mapping[str, Any], mesh: Mesh) -> None:
    """Raises ConfigError, on every rank, naming the first key whose value differs between ranks.

    data: what the stream of documents follows from, which is compared in place of its section.
    """
    shared = {key: value for key, value in config.items() if key not in _OWN}
    first, *others = gather_objects(flatten(shared) | dict(data), mesh.group)
    for rank, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"{key}={other.get(key)} on rank {rank}, {first.get(key)} on rank 0; "
                    "allowed: the same on every rank"
                )


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their full keys, `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
