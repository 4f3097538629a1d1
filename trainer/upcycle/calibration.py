"""The rows that conversions are made by and measured on: the first that training would read."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.config import Config
from trainer.batch import Batch
from trainer.construct import call
from trainer.data import StreamedData, TrainStream, build_data
from trainer.errors import ConfigError
from trainer.upcycle.recipe import Recipe


def calibration(data: Mapping[str, Any], recipe: Recipe, model: Config) -> list[Batch]:
    """Rows of at least recipe.calibration_tokens tokens in all; none for 0.

    data, model: sections. Raises ConfigError for too few, and for tokens that the model lacks.
    """
    wanted, d_model = recipe.calibration_tokens, model["d_model"]
    if wanted < 0 or (recipe.reads_data and wanted <= d_model):
        allowed = f"above model.d_model = {d_model}, better many times that"
        raise ConfigError(
            f"recipe.calibration_tokens={wanted}: allowed: "
            f"{allowed if recipe.reads_data else '0 or more'}"
        )
    if wanted == 0:
        return []
    documents = call(build_data, data, "data")
    if isinstance(documents, StreamedData):
        raise ConfigError("data.streaming=true: calibration reads a token store; allowed: false")
    vocabulary = documents.tokenizer.vocab_size
    if vocabulary > model["vocab_size"]:
        raise ConfigError(
            f"data.tokenizer={data['tokenizer']}: it has {vocabulary} tokens and the source "
            f"{model['vocab_size']}; allowed: the source's own"
        )
    stream = TrainStream(documents, micro_batch_size=1)
    batches: list[Batch] = []
    found = 0
    while found < wanted:
        if stream.epoch > 0:
            raise ConfigError(
                f"recipe.calibration_tokens={wanted}: data={data['source']} has {found} in full "
                "steps; allowed: that or less, other data, or a smaller data.batch_size"
            )
        for batch in stream.next_step():
            if found < wanted:
                batches.append(batch)
                found += int(batch.info.valid.sum())
    return batches
