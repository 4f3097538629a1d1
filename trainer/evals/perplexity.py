"""Token-mean loss on documents, each token with a predecessor scored once."""

import math

import numpy as np

from trainer.evals.task import Bench, Result


class Perplexity:
    """loss in nats a token, perplexity, and the number of tokens scored."""

    def names(self, seq_len: int) -> list[str]:
        return ["loss", "perplexity", "tokens"]

    def check(self, bench: Bench) -> None:
        """Without documents there are no figures."""

    def run(self, bench: Bench) -> Result:
        total = np.zeros(2)  # loss, tokens
        for batch, scores in bench.score_documents():
            total += [float(scores.loss.sum()), batch.valid_labels]
        nats, tokens = bench.sum(total)
        if not tokens:
            return Result(figures={"loss": None, "perplexity": None, "tokens": 0})
        loss = float(nats / tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Result(figures={"loss": loss, "perplexity": perplexity, "tokens": int(tokens)})
