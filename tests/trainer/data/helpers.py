"""A store of small documents, each token of which tells where it is from."""

import numpy as np

from trainer.data import build_data
from trainer.data.steps import RowId

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
        "column": None,
        "subset": None,
        "split": None,
        "task": None,
        "options": None,
        "tokenizer": "bytes",
        "seq_len": 16,
        "batch_size": 8,
        "seed": 0,
        "eval_fraction": 0.25,
        "packing": "best_fit",
        "overlong": "split",
        "long_documents": {"above": None, "repeat": 1},
        "sources": None,
        "stages": None,
        "balance": False,
        "workers": 0,
        "streaming": False,
        "window": 3,
        "eval_documents": 4,
        "cache_dir": str(folder / "cache"),
        "cache_workers": 1,
        "cache_wait_minutes": 1.0,
    }
    return build_data(**options | changes)


def read(data, *rows, source="", seq_len=None):
    """A batch of rows, each an (epoch, row)."""
    seq_len = seq_len or data.seq_len
    ids = [RowId(source, epoch, row) for epoch, row in rows]
    return data.reader.batch(data.locate(ids, seq_len), seq_len)


def corpus(data):
    """The documents of the only source."""
    (made,) = data.corpora.values()
    return made


def packed(data, source="", seq_len=None):
    """The rows of a source."""
    return data.rows(source, seq_len or data.seq_len)
