"""What packing leaves empty and cuts, and what planning costs: python -m benchmarks.packing.

Without arguments the standard library's documents, by each policy and length of a row, with first
fit beside them for comparison; `documents=10000000` draws so many lengths with a heavy tail, and
leaves first fit out, which is quadratic. Each plan is made in a process of its own.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from trainer.data.formats import build_source
from trainer.data.packing import Array, Pieces, cut
from trainer.data.plan import PACKERS, make_plan
from trainer.data.prepare import Way, open_store
from trainer.data.tokenizer import build_tokenizer
from trainer.metrics import peak_memory_gib

SEQ_LENS = (2048, 8192, 32768)


def first_fit(lengths: Array, seq_len: int) -> Pieces:
    """Pieces as they come, each into the first row that has room."""
    owner, start, length = cut(lengths, seq_len)
    room = np.full(len(length), seq_len)
    row = np.empty(len(length), np.int64)
    for i, size in enumerate(length.tolist()):
        row[i] = np.argmax(room >= size)
        room[row[i]] -= size
    return Pieces(owner, start, length, row)


def heavy_tailed(count: int) -> Array:
    """Log-normal lengths with a median of 665 tokens; one document in 50 is of a Pareto tail."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(6.5, 1.3, count))
    tail = np.flatnonzero(generator.random(count) < 0.02)
    lengths[tail] = 2000 * (1 - generator.random(len(tail))) ** (-1 / 1.1)
    return np.clip(lengths, 1, 5e6).astype(np.int64)


def standard_library() -> Array:
    cache = Path("~/.cache/longhaul").expanduser()
    source, tokenizer = build_source("stdlib", None), build_tokenizer("bytes")
    return open_store(source, tokenizer, cache, Way()).lengths


def measure(policy: str, seq_len: int, documents: int) -> str:
    """A row of the table."""
    PACKERS["first_fit"] = first_fit
    lengths = heavy_tailed(documents) if documents else standard_library()
    before, start = peak_memory_gib(torch.device("cpu")), time.process_time()
    plan = make_plan(
        np.arange(len(lengths)),
        lengths,
        seq_len=seq_len,
        packing=policy,  # type: ignore[arg-type]  # first_fit is no policy of a run
        shuffle=(0, 0),
    )
    seconds = time.process_time() - start
    peak = peak_memory_gib(torch.device("cpu"))
    return (
        f"| {seq_len:,} | {policy} | {plan.rows:,} | {plan.padding_share:.3%} | "
        f"{plan.cut_documents / plan.documents:.1%} | {plan.cut_tokens / plan.tokens:.1%} | "
        f"{seconds:.2f} | {peak:.2f} | {peak - before:.2f} |"
    )


def main(arguments: list[str]) -> None:
    documents = int(dict(argument.split("=") for argument in arguments).get("documents", 0))
    policies = ["best_fit", "concat"] + ["first_fit"] * (not documents)
    print(
        "| seq_len | policy | rows | padding | documents cut | of tokens | CPU s | GiB | GiB more |"
    )
    print("|" + "---|" * 9)
    for seq_len in SEQ_LENS:
        for policy in policies:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                print(process.submit(partial(measure, policy, seq_len, documents)).result())


if __name__ == "__main__":
    main(sys.argv[1:])
