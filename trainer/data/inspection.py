"""What a token store holds, for people: counts, lengths, origins, and some of its documents."""

from collections.abc import Iterator

import numpy as np

from trainer.data.plan import make_plan
from trainer.data.store import TokenStore
from trainer.data.tokenizer import Tokenizer

FILES_SHOWN = 10
TOKENS_SHOWN = 120


def describe(
    store: TokenStore, tokenizer: Tokenizer, *, seq_len: int, samples: int
) -> Iterator[str]:
    """Lines; seq_len: of the rows whose padding is told."""
    size = store.tokens * store.dtype.itemsize / 1e6
    yield (
        f"store      {store.folder}: {len(store):,} documents, {store.tokens:,} tokens, "
        f"{size:,.1f} MB of {store.dtype.name} in {len(store.shards):,} shards; "
        f"{store.empty_documents:,} empty documents left out"
    )
    yield f"hash       {store.hash}"
    yield f"tokenizer  {store.tokenizer}"
    yield f"packed     {make_plan(np.arange(len(store)), store.lengths, seq_len=seq_len)}"
    yield from _lengths(store)
    yield from _files(store)
    for document in np.linspace(0, len(store), samples, endpoint=False).astype(int).tolist():
        text = tokenizer.decode(store.read(document, 0, TOKENS_SHOWN))
        more = "..." if store.lengths[document] > TOKENS_SHOWN else ""
        yield f"document {document}, {store.lengths[document]:,} tokens of {store.name(document)}:"
        yield "".join(f"    {line}" for line in text.splitlines(keepends=True)) + more


def _lengths(store: TokenStore) -> Iterator[str]:
    """A line for each power of two between the shortest and the longest document."""
    counts = np.array(store.length_histogram)
    bins = np.frexp(store.lengths.astype(np.float64))[1] - 1
    tokens = np.bincount(bins, store.lengths)
    yield f"{'length in tokens':>24} {'documents':>14} {'share of tokens':>16}"
    for i in range(int(np.flatnonzero(counts)[0]), len(counts)):
        span = f"{2**i:,} to {2 ** (i + 1) - 1:,}"
        yield f"{span:>24} {counts[i]:>14,} {tokens[i] / store.tokens:>16.2%}"


def _files(store: TokenStore) -> Iterator[str]:
    files = store.tokens_by_file()
    yield f"{len(files):,} files, those with most tokens:"
    for name, tokens in files[:FILES_SHOWN]:
        yield f"    {name}: {tokens:,} tokens, {tokens / store.tokens:.2%}"
