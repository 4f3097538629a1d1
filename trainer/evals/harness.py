"""Our models as lm-evaluation-harness sees them; imported only where that is installed.

Every rank asks the same questions and knows all answers; the scoring in between is shared.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from parallel.collectives import gather_objects
from trainer.batch import IGNORE_INDEX, Run
from trainer.errors import ConfigError
from trainer.evals.scoring import ANSWERS, ANSWERS_RIGHT, LOSS
from trainer.evals.task import Bench

NEW_TOKENS = 256  # where a task does not say how many
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # how tasks say it

Pair = tuple[list[int], list[int]]  # tokens of a context and of what follows it


class HarnessModel(LM):
    """max_length: tokens that the model sees at once, None: all there are; of more, the last ones
    are taken, `cut` counts how often."""

    def __init__(self, bench: Bench, *, max_length: int | None) -> None:
        super().__init__()
        self._bench, self._max_length = bench, max_length
        self._text = bench.data.tokenizer
        self._alone = [*self._text.start] or [self._text.eos_id]  # before a text without context
        self.cut = 0

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, and whether it is what greedy decoding gives."""
        found = self._score([self._pair(*request.args) for request in requests])
        return [(-row[LOSS], bool(row[ANSWERS_RIGHT] == row[ANSWERS])) for row in found]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of each text, the first token behind the one that starts documents, or ends them where
        none does."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self._encode(request.args[0])
            windows = get_rolling_token_windows(
                tokens, self._alone[0], self._max_length or max(len(tokens), 1), 1
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, row in zip(owners, self._score(pairs), strict=True):
            totals[owner] -= row[LOSS]
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Data ranks take turns. Raises ConfigError where no rank has the model whole."""
        if self._bench.write is None:
            raise ConfigError(
                "tasks.lm_eval.tasks: one writes text, which wants a whole model on every rank; "
                "allowed: engine=ddp with parallel=single, or tasks that only score"
            )
        mesh = self._bench.mesh
        own = range(mesh.data_rank, len(requests), mesh.data_ranks)
        texts = {i: self._generate(*requests[i].args) for i in own}
        every = {i: text for part in gather_objects(texts, mesh.group) for i, text in part.items()}
        return [every[i] for i in range(len(requests))]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        assert self._bench.write is not None
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        prompt = self._prompt(context)[-(self._max_length or 0) :] or self._alone
        sampled = options.get("do_sample", True)
        limits = (options[key] for key in LIMITS if key in options)
        written: list[int] = []
        text = ""
        for token in self._bench.write(
            torch.tensor([prompt]),
            tokens=int(next(limits, NEW_TOKENS)),
            temperature=float(options.get("temperature", 0.0)) if sampled else 0.0,
        ):
            if int(token) == self._text.eos_id:
                break
            written.append(int(token))
            text = self._text.decode(written)
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _encode(self, text: str) -> list[int]:
        return self._text.encode(text).tolist()

    def _prompt(self, text: str) -> list[int]:
        return [*self._text.start, *self._encode(text)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Blanks between both go with what follows, where tokenizers have them."""
        kept = context.rstrip()
        if not kept:
            return self._alone, self._encode(context + continuation)
        before = self._prompt(kept)
        return before, self._prompt(context + continuation)[len(before) :]

    def _score(self, pairs: Sequence[Pair]) -> list[list[float]]:
        """[pairs][5]: the `scoring.outcome` of each."""
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        runs = [self._run(*pairs[i]) for i in order]
        found = self._bench.outcomes([len(run.tokens) for run in runs], runs.__getitem__)
        by_pair = dict(zip(order, found.tolist(), strict=True))
        return [by_pair[i] for i in range(len(pairs))]

    def _run(self, context: list[int], continuation: list[int]) -> Run:
        """What follows the last token needs no place: that one is not read."""
        ids = np.array([*context, *continuation], np.int64)
        if self._max_length is not None and len(ids) > self._max_length + 1:
            ids = ids[-self._max_length - 1 :]
            self.cut += 1
        labels = ids[1:].copy()
        labels[: -len(continuation) or len(labels)] = IGNORE_INDEX
        return Run(ids[:-1], labels=labels)
