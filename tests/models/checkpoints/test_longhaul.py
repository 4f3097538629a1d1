"""The family of all our models: names, sections, refusals; `test_portable.py` runs its folders."""

import copy

import pytest

from models.checkpoints import longhaul
from tests.models.build import compose, make_model


@pytest.fixture(scope="module")
def config():
    made = compose(["model=kimi_linear", "model.d_model=16", "model.vocab_size=320"])
    mixer = {name: made["mixer"][name] for name in ("kda", "mla")}
    return {"model": made["model"], "mixer": mixer, "tokens": {"bos": None, "eos": 5, "pad": 6}}


def test_configuration_and_names_come_back(config):
    hf = longhaul.export_config(config)
    assert longhaul.import_config(hf) == config
    state = make_model(["model=kimi_linear", "model.d_model=16"]).state_dict()
    table = longhaul.key_table(config)
    assert {name: entry.shape for name, entry in table.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    assert table["norm.weight"].parts[0].name == "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["mixer"]["kda"].update(_target_="os.system"), "os.system is no mixer"),
        (lambda c: c["mixer"]["kda"].update(_target_="models.mixers.kda.X"), "no mixer models.*X"),
        (lambda c: c["mixer"]["kda"].update(heads=3), "makes no model: .*heads"),
        (lambda c: c["model"].update(d_model=0), "d_model is 0"),
        (lambda c: c["model"].pop("moe"), "makes no model: 'moe'"),
    ],
)
def test_what_makes_no_model_is_one_line(config, change, reason):
    broken = copy.deepcopy(config)
    change(broken)
    with pytest.raises(ValueError, match=reason):
        longhaul.key_table(broken)
