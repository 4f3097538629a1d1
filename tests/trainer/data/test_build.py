import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.trainer.data.helpers import corpus, packed, read
from trainer.data import build_data

CONF = Path(__file__).parents[3] / "conf"


def config(name, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose(f"data/{name}", ["+trainer.seed=3", *overrides])
    return OmegaConf.to_container(composed, resolve=True)["data"]


@pytest.mark.parametrize("name", ["stdlib", "files", "jsonl", "parquet", "hf", "store", "mixture"])
def test_config_has_the_keywords_of_build_data(name):
    keywords = config(name, "data.path=here")
    assert keywords.keys() == inspect.signature(build_data).parameters.keys()
    assert keywords["source"] == name
    assert keywords["seed"] == 3


def test_default_configuration_reads_the_standard_library(tmp_path):
    data = build_data(**config("stdlib", f"data.cache_dir={tmp_path}"))
    batch = read(data, *((0, row) for row in range(4)))
    assert batch.tokens.shape == (4, 2048)
    assert batch.valid_labels > 0.9 * batch.labels.numel()
    made = corpus(data)
    assert 0 < len(made.documents("eval")) < 0.1 * len(made.store)
    assert packed(data).plan(0).padding_share < 0.01
    document = next(i for i in range(len(made.store)) if made.store.name(i) == "json/decoder.py")
    assert "class JSONDecoder" in data.tokenizer.decode(made.store.read(document, 0, 10**6))
