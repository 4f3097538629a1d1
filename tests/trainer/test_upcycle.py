"""Upcycling of transformers' own models, by the command: folders in, folders out."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.checkpoints.config import layer_mixers
from models.convert.measure import Row
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.build import compose, randomise
from trainer.checkpoint.convert import convert as write_weights
from trainer.checkpoint.weights import open_weights
from trainer.errors import ConfigError
from trainer.load import load_model
from trainer.main import convert
from trainer.upcycle import conversion, teacher

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PEERS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True)
    ),
    "biased llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
SMALL = ["recipe.kv_rank=40", "recipe.rope_dim=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """With a few documents, and each peer in a folder of its name, in fp64."""
    place = tmp_path_factory.mktemp("upcycle")
    (place / "documents").mkdir()
    for i in range(12):
        (place / "documents" / f"{i}.txt").write_text(f"{i}: the quick brown fox " * (i + 1))
    for name, make in PEERS.items():
        randomise(make().double()).save_pretrained(place / name)
    return place


def run(place: Path, source: str, target: str, recipe: str, *options: str) -> Path:
    """Converts place/source into place/target."""
    paths = [f"source={place / source}", f"target={place / target}"]
    data = ["data=files", f"data.path={place / 'documents'}", f"data.cache_dir={place / 'cache'}"]
    rows = ["data.seq_len=64", "data.batch_size=2", "recipe.calibration_tokens=300"]
    quoted = [option.replace("place", str(place)) for option in options]
    convert(compose([*paths, f"recipe={recipe}", *data, *rows, *quoted], "convert"))
    return place / target


def logits(folder: Path, tokens: Tensor) -> Tensor:
    cpu = torch.device("cpu")
    model = load_model(str(folder), ops=Ops(), device=cpu, dtype=torch.float64, vocab_size=320)
    return (
        model(tokens, SequenceInfo.span(*tokens.shape[:1], 0, tokens.shape[1]))
        @ model.head_weight.T
    )


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def tokens() -> Tensor:
    return torch.randint(320, (2, 50), generator=torch.Generator().manual_seed(5))


def report(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())["layers"]


@pytest.mark.parametrize("name", ["llama", "biased llama", "qwen2"])
def test_full_latent_attention_is_the_source(place, name, capsys):
    source = logits(place / name, tokens())
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float64)(tokens())
    assert error(source, theirs.logits) < 1e-6  # their rotary frequencies are in fp32
    for rope, more in (("rorope", "recipe.q_rank=full"), ("select", "recipe.q_rank=null")):
        sizes = ["recipe.kv_rank=full", "recipe.rope_dim=full", f"recipe.rope={rope}", more]
        folder = run(place, name, f"{name} {rope}", "transmla", *sizes)
        assert error(logits(folder, tokens()), source) < 1e-10
        for layer in report(folder):
            assert all(step["exact"] and step["scores"] < 1e-12 for step in layer["steps"])
            assert layer["outputs"] < 1e-11
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1] == str(folder)
        assert "layer  mixer     behind" in printed.err


def test_rows_are_measured_up_to_a_number_of_tokens(place, monkeypatch):
    """Which need not be whole: the tokens before it tell all of a token."""
    measured = []

    class Watched(Row):
        def seen(self):
            measured.append(len(self.x))
            return super().seen()

    monkeypatch.setattr(teacher, "MEASURED_TOKENS", 100)
    monkeypatch.setattr(conversion, "Row", Watched)
    sizes = ["recipe.kv_rank=full", "recipe.rope_dim=full"]
    folder = run(place, "llama", "measured", "transmla", *sizes)
    assert sum(measured) == 3 * 100 and max(measured) <= 64
    for layer in report(folder):
        assert all(step["scores"] < 1e-12 for step in layer["steps"])
        assert layer["outputs"] < 1e-11


@pytest.mark.parametrize(("name", "q_rank"), [("llama", "null"), ("qwen2", "40")])
def test_transformers_reads_what_transmla_makes(place, name, q_rank):
    sizes = [*SMALL, "recipe.latent_norm=true", "recipe.freqfold=2", f"recipe.q_rank={q_rank}"]
    native = run(place, name, f"{name} mla", "transmla", *sizes)
    exported = write_weights(
        source=str(native), target=str(place / f"{name} deepseek"), format="hf"
    )
    peer = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64)
    assert type(peer) is DeepseekV3ForCausalLM
    with torch.no_grad():
        theirs = peer(tokens()).logits
    assert error(theirs, logits(native, tokens())) < 1e-6
    assert torch.equal(logits(exported, tokens()), logits(native, tokens()))


def test_what_is_left_out_is_reported(place):
    source, errors = logits(place / "llama", tokens()), []
    for rank in (12, 36):
        folder = run(
            place,
            "llama",
            f"rank {rank}",
            "transmla",
            *SMALL,
            f"recipe.kv_rank={rank}",
            "recipe.freqfold=2",
        )
        errors.append(error(logits(folder, tokens()), source))
    assert errors[0] > errors[1] > 1e-3
    for layer in report(folder):
        partial, latent = layer["steps"]
        assert not partial["exact"] and not latent["exact"]
        assert 0 < partial["outputs"] < latent["outputs"]
        assert layer["outputs"] == pytest.approx(latent["outputs"], rel=1e-9)


def test_a_hybrid_has_latent_attention_where_it_says(place):
    (place / "selection.json").write_text(json.dumps({"layers": [1]}))
    sizes = [*SMALL, "recipe.q_rank=40", "recipe.mixer=kda"]
    by_file = run(
        place, "qwen2", "by file", "zebra", *sizes, "recipe.selection=place/selection.json"
    )
    by_list = run(place, "qwen2", "by list", "zebra", *sizes, "recipe.mla_layers=[1]")
    config = yaml.safe_load((by_list / "config.yaml").read_text())
    assert layer_mixers(config["model"]) == ["kda", "mla", "kda"]
    assert set(config["mixer"]) == {"kda", "mla"}
    assert config["mixer"]["mla"]["num_kv_heads"] == 2 and not config["mixer"]["mla"]["latent_norm"]
    assert torch.equal(logits(by_file, tokens()), logits(by_list, tokens()))
    assert [layer["dropped"] for layer in report(by_list)] == [
        ["positions", "biases"],
        [],
        ["positions", "biases"],
    ]


def test_an_assembly_has_layers_of_both(place):
    """Put together of two conversions it is the hybrid that one makes."""
    sizes = [*SMALL, "recipe.q_rank=40"]
    run(place, "llama", "base", "zebra_mamba2")
    run(place, "llama", "other", "zebra_mla", *sizes)
    hybrid = run(place, "llama", "hybrid", "zebra", *sizes, "recipe.mla_layers=[0,2]")
    paths = [f"source={place / 'base'}", f"target={place / 'assembled'}", "recipe=assemble"]
    chosen = [f"recipe.other={place / 'other'}", "recipe.layers=[0,2]"]
    convert(compose([*paths, *chosen], "convert"))
    config = yaml.safe_load((place / "assembled" / "config.yaml").read_text())
    assert config == yaml.safe_load((hybrid / "config.yaml").read_text())
    made, base, other = (open_weights(place / name) for name in ("assembled", "base", "other"))
    for name in made.shapes:
        source = other if name.startswith(("layers.0.", "layers.2.")) else base
        assert torch.equal(made.get(name), source.get(name)), name
    with pytest.raises(ConfigError, match=r"recipe.other=.*: its model.tie_embeddings is False"):
        convert(
            compose(
                [
                    *paths[:1],
                    f"target={place / 'x'}",
                    "recipe=assemble",
                    f"recipe.other={place / 'qwen2'}",
                    "recipe.layers=[0]",
                ],
                "convert",
            )
        )


def test_layers_that_differ_have_sections_of_their_own(place):
    options = [*SMALL, "recipe.rope=select", "recipe.pairs=norm", "recipe.layers=[0,2]"]
    folder = run(place, "llama", "norm", "transmla", *options, "dtype=bf16")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["pattern"] == ["mla_00", "gqa", "mla_02"]
    turns = [config["mixer"][f"mla_0{i}"]["rope_frequencies"] for i in (0, 2)]
    assert len(turns[0]) == 8 and turns[0] != turns[1]
    assert logits(folder, tokens()).isfinite().all()
    assert open_weights(folder).get("layers.0.mixer.kv_up.weight").dtype == torch.bfloat16


def test_a_converted_model_is_converted_again(place):
    """Layers that are no attention any more stay as they are."""
    first = run(place, "llama", "first", "linear", "recipe.layers=[0]")
    second = run(place, "first", "second", "zebra_mla", *SMALL, "recipe.q_rank=null")
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert config["model"]["pattern"] == ["kda", "mla", "mla"]
    assert [layer["layer"] for layer in report(second)] == [1, 2]
    before, after = open_weights(first), open_weights(second)
    for name in ("layers.0.mixer.qkv_proj.weight", "layers.1.ffn.down.weight", "embed.weight"):
        assert torch.equal(before.get(name), after.get(name))


@pytest.mark.parametrize(
    ("source", "recipe", "options", "reason"),
    [
        (
            "llama",
            "transmla",
            ["recipe.kv_rank=99", "recipe.rope_dim=16"],
            r"recipe: layer 0: kv_rank is 99; allowed: 1 ",
        ),
        ("llama", "transmla", ["recipe.rope=yarn"], "recipe.rope=yarn: allowed: select, rorope, "),
        ("llama", "transmla", ["recipe.layers=[3]"], "recipe.layers has 3; allowed: 0, 1, 2"),
        ("llama", "transmla", ["recipe.calibration_tokens=0"], "above model.d_model = 48"),
        (
            "llama",
            "transmla",
            ["recipe.calibration_tokens=9999"],
            "calibration_tokens=9999: .* has",
        ),
        ("llama", "zebra", [], "recipe.mla_layers is None and selection is None; allowed: one"),
        (
            "llama",
            "zebra",
            ["recipe.selection=place/x"],
            "recipe.selection is .*x; it holds no layers",
        ),
        ("llama", "linear", ["recipe.mixer=gla"], "recipe.mixer=gla: allowed: "),
        ("llama", "linear", ["format=hf"], "format=hf: recipes write native folders"),
        ("qwen3", "transmla", [], r"recipe: layer 0: qk_norm is true; .* allowed: false, or "),
        ("missing", "linear", [], "source=.*missing: no weights in"),
    ],
)
def test_bad_input_is_one_line(place, source, recipe, options, reason):
    with pytest.raises(ConfigError, match=reason) as raised:
        run(place, source, "never", recipe, *options)
    assert "\n" not in str(raised.value)
    assert not (place / "never").exists() and not (place / ".never").exists()


def test_a_model_without_attention_is_refused(place):
    run(place, "llama", "without", "linear")
    with pytest.raises(
        ConfigError, match="source: its mixers are kda; allowed: a model with layers"
    ):
        run(place, "without", "again", "zebra_mla")
