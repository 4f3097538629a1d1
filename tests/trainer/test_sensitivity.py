"""Sensitivities of layers against whole hybrids, through the command."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml

from models.checkpoints.shards import write_shards
from models.convert.selection import select_layers
from tests.models.build import compose, make_model, randomise
from tests.trainer.tiny import overrides
from trainer import main, sensitivity
from trainer.batch import IGNORE_INDEX
from trainer.console import close_logging
from trainer.data import build_data

LAYERS = 4
SHAPE = [
    "model.d_model=8",
    f"model.num_layers={LAYERS}",
    "model.ffn.hidden=8",
    "model.moe=null",
    "mixer.gqa.num_heads=2",
    "mixer.gqa.num_kv_heads=1",
    "mixer.gqa.head_dim=4",
    "mixer.kda.num_heads=2",
    "mixer.kda.head_dim=4",
]
MODELS = {"teacher": ["gqa"], "base": ["kda"], "other": ["gqa"]}


def make(pattern, *more: str):
    return make_model(
        [*SHAPE, f"model.pattern=[{','.join(pattern)}]", *more], device="cpu"
    ).double()


def write(folder, name: str, pattern, *more: str) -> dict[str, torch.Tensor]:
    """A native folder of random weights; -> these."""
    model = randomise(make(pattern, *more))
    factor = 1 + len(name) / 8  # three models, not one
    state = {key: x.detach() * factor for key, x in model.state_dict().items()}
    (folder / name).mkdir()
    write_shards(folder / name, iter(state.items()), max_bytes=1e9)
    config = compose([*SHAPE, f"model.pattern=[{','.join(pattern)}]", *more])
    sections = {"model": config["model"], "mixer": {key: config["mixer"][key] for key in pattern}}
    (folder / name / "config.yaml").write_text(yaml.safe_dump(sections))
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With documents."""
    folder = tmp_path_factory.mktemp("sensitivity")
    overrides(folder)
    return folder


def data_words(folder) -> list[str]:
    place = [f"data.path={folder / 'documents'}", f"data.cache_dir={folder / 'cache'}"]
    return ["data=files", *place, "data.seq_len=48", "data.eval_fraction=0.3"]


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, dict[str, torch.Tensor]]:
    return {name: write(folder, name, pattern) for name, pattern in MODELS.items()}


def words(folder, *more: str) -> list[str]:
    models = [f"{name}={folder / name}" for name in MODELS]
    rest = ["rows=3", "trainer.precision=fp64", "trainer.micro_batch_size=2", "trainer.loss_tile=7"]
    return [
        *data_words(folder),
        *models,
        *rest,
        "count=2",
        f"target={folder / 'layers.json'}",
        *more,
    ]


@pytest.fixture
def run(folder, weights, monkeypatch, capfd):
    """Runs the command in this process; -> what it prints, or its one line of error."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*more: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["select_layers.py", *words(folder, *more)])
        with pytest.raises(SystemExit) as stop:
            main.command("select_layers", main.select_layers)
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        assert code == 0 or err.count("error: ") == 1, err
        return err if code else out

    yield run
    close_logging()


def kl(folder, pattern, state, teacher) -> float:
    """Nats a token, by whole models and whole logits."""
    data = build_data(**compose(data_words(folder))["data"])
    models = make(MODELS["teacher"]), make(pattern)
    for model, values in zip(models, (teacher, state), strict=True):
        model.load_state_dict(values)
    total = tokens = 0.0
    for batch in [*data.eval_batches(micro_batch_size=2)][:2]:
        with torch.no_grad():
            wanted, found = (
                (m(batch.tokens, batch.info) @ m.head_weight.mT).log_softmax(-1) for m in models
            )
        apart = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
        total += float(apart[batch.labels != IGNORE_INDEX].sum())
        tokens += batch.valid_labels
    return total / tokens


def exchanged(weights, i: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{i}."
    kept = {k: x for k, x in weights["base"].items() if not k.startswith(prefix)}
    return kept | {k: x for k, x in weights["other"].items() if k.startswith(prefix)}


def test_a_layer_gains_what_the_whole_hybrid_does(run, folder, weights):
    printed = run()
    found = json.loads((folder / "layers.json").read_text())
    start = kl(folder, ["kda"], weights["base"], weights["teacher"])
    expected = [start]
    for i in range(LAYERS):
        pattern = ["gqa" if j == i else "kda" for j in range(LAYERS)]
        expected.append(kl(folder, pattern, exchanged(weights, i), weights["teacher"]))
    assert found["kl"] == pytest.approx(expected, rel=1e-10)
    gains = [start - x for x in expected[1:]]
    assert found["sensitivities"] == pytest.approx(gains, rel=1e-8)
    assert found["layers"] == select_layers(gains, 2) and found["count"] == 2
    assert printed == f"[{','.join(map(str, found['layers']))}]\n"


def test_what_is_known_is_not_measured_again(run, folder, monkeypatch):
    run()
    whole = json.loads((folder / "layers.json").read_text())
    partial = folder / "partial.json"
    kept = {key: x for key, x in whole.items() if key not in ("sensitivities", "count", "layers")}
    partial.write_text(json.dumps(kept | {"kl": whole["kl"][:3]}))
    measured = []
    once = sensitivity._kl
    monkeypatch.setattr(sensitivity, "_kl", lambda *args: measured.append(1) or once(*args))
    run(f"target={partial}")
    assert json.loads(partial.read_text()) == whole and len(measured) == LAYERS - 2
    run(f"target={partial}", "count=3")
    assert len(json.loads(partial.read_text())["layers"]) == 3 and len(measured) == LAYERS - 2


def test_bad_input_is_one_line(run, folder):
    run()
    write(folder, "short", ["kda"], "model.num_layers=2")
    write(folder, "words", ["gqa"], "model.vocab_size=384")
    (folder / "none.json").write_text("[]")
    for change, line in {
        "count=5": "count=5: allowed: 1 to 4, the layers of the models",
        "rows=0": "rows=0: allowed: 1 or more",
        f"other={folder / 'short'}": "short: it has 2 layers, the model 4; allowed: as many",
        f"teacher={folder / 'words'}": "words: it has 384 words, the model 320; allowed: the same",
        "base=nowhere": "base=nowhere: no weights in nowhere; allowed: a Hugging Face folder",
        f"other={folder / 'base'}": "layers.json: holds results of a different other=; allowed: a",
        "rows=1": "layers.json: holds results of a different rows=; allowed: a",
        f"target={folder / 'none.json'}": "none.json: no results of layers; allowed: a new file",
        "data.eval_fraction=0": "data.eval_fraction: no document is held out; allowed: a larger",
    }.items():
        assert line in run(change, "data.tokenizer=bytes", code=2), change
