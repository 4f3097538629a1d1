"""Folders of safetensors files as Hugging Face lays them out.

One `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with an index
`model.safetensors.index.json`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ShardReader:
    """The tensors of a folder: names and shapes at once, values one by one.

    Raises ValueError, naming the file, for what is missing, unreadable or truncated, and where
    index and files disagree.
    """

    def __init__(self, folder: Path) -> None:
        if not has_shards(folder):
            raise ValueError(
                f"{folder} has neither {SINGLE} nor {INDEX}; weights are read from safetensors "
                "files, and from no others"
            )
        placed = _read_index(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files = {}
        for path in sorted({folder / SINGLE} if placed is None else set(placed.values())):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
            names = set(file.keys())
            if placed is not None and names != {name for name in placed if placed[name] == path}:
                raise ValueError(f"{path} does not hold the tensors that {folder / INDEX} lists")
            for name in names:
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                self._files[name] = file

    def get(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _read_index(folder: Path) -> dict[str, Path] | None:
    """Tensor name -> file, or None where one file holds all."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        placed = json.loads(path.read_bytes())["weight_map"]
        return {name: folder / file for name, file in placed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a safetensors index") from None


def has_shards(folder: Path) -> bool:
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_bytes: float) -> None:
    """Writes a stream of named tensors, in files of at most max_bytes, or of one larger tensor.

    Holds two files' worth of tensors in memory at most: those that wait, and their bytes.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    waiting_bytes = total_bytes = 0

    def flush() -> None:
        path = folder / _unnumbered(len(shards))
        # transformers refuses a file that does not say it comes from PyTorch.
        save_file(waiting, path, metadata={"format": "pt"})
        # The library lets only the owner read it; whoever may read the folder shall.
        path.chmod(folder.stat().st_mode & 0o666)
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and waiting_bytes + tensor.nbytes > max_bytes:
            flush()
            waiting_bytes = 0
        # A copy, since the library refuses views that share a storage.
        waiting[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        waiting_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    _number(folder, shards, total_bytes)


def _unnumbered(shard: int) -> str:
    return f".shard-{shard}.safetensors"


def _number(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Gives the files their names, which tell how many there are, and writes the index."""
    if len(shards) == 1:
        (folder / _unnumbered(0)).rename(folder / SINGLE)
        return
    placed = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / _unnumbered(i)).rename(folder / file)
        placed.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
