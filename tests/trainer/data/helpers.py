"""A store of small documents, each token of which tells where it is from."""

import numpy as np

from trainer.data import build_data

LENGTHS = [1, 5, 9, 14, 3, 40, 8, 2, 6, 11, 4, 23, 7, 12, 16, 10, 19, 3, 5, 90]


def write_documents(folder, lengths=LENGTHS):
    """Document i is `lengths[i]` bytes of its own."""
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i, length in enumerate(lengths):
        (folder / f"{i:03}").write_bytes(generator.bytes(length))
    return folder


def build(folder, **changes):
    options = {
        "source": "files",
        "path": str(folder / "text"),
        "task": None,
        "options": None,
        "tokenizer": "bytes",
        "seq_len": 16,
        "batch_size": 8,
        "seed": 0,
        "eval_fraction": 0.25,
        "overlong": "split",
        "cache_dir": str(folder / "cache"),
    }
    return build_data(**options | changes)
