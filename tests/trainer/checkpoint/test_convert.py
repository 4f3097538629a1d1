"""Conversion and weights to start from: checkpoint, native folder, Hugging Face folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from models.checkpoints.shards import INDEX, ShardReader
from models.hybrid import HybridLM
from tests.launch import alone
from tests.models.build import compose, make_model, randomise
from tests.trainer.evals.helpers import hugging_face
from trainer.checkpoint.convert import convert
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.weights import load_weights, open_weights
from trainer.data.tokenizer import build_tokenizer
from trainer.errors import ConfigError
from trainer.load import tokenizer_of

SMALL = [
    "model=kimi_linear",
    "model.d_model=32",
    "model.num_layers=3",
    "model.pattern=[kda,mla]",
    "model.ffn.hidden=40",
    "model.moe={num_experts: 3, top_k: 2, hidden: 16, shared_hidden: 16, routed_scaling: 2.0}",
    "mixer.kda.num_heads=2",
    "mixer.kda.head_dim=8",
    "mixer.mla={num_heads: 3, kv_rank: 12, nope_dim: 8, rope_dim: 4, v_dim: 6}",
]
FP32 = ("A_log", "dt_bias", "e_score_correction_bias")


def make(overrides=SMALL) -> HybridLM:
    model = randomise(make_model(overrides, device="cpu"))
    for i, router in enumerate(model.routers()):
        router.bias.copy_(torch.tensor([0.1, -0.2, 0.3]) * (i + 1))
    return model


def save(
    model: HybridLM, folder: Path, overrides=SMALL, step: int = 5, *, progress=None, **sections
) -> Path:
    """A checkpoint such as the trainer writes."""
    config = compose(overrides) | sections
    store = CheckpointStore(folder / "checkpoints")
    state = {"model": get_model_state_dict(model), "optimizer": {"state.x.step": torch.ones(())}}
    store.save(step, state, progress=progress or {}, config=yaml.safe_dump(config))
    return store.finish()


def run(source, target, format, **options) -> Path:
    return convert(source=str(source), target=str(target), format=format, **options)


def assert_holds(folder: Path, model: HybridLM) -> None:
    weights = open_weights(folder)
    state = model.state_dict()
    assert set(weights.shapes) == set(state)
    for name, tensor in state.items():
        assert weights.get(name).dtype == tensor.dtype
        assert torch.equal(weights.get(name), tensor), name


def test_every_way_round_is_exact(tmp_path):
    model = make()
    checkpoint = save(model, tmp_path / "run")
    ways = {
        "hf": checkpoint,
        "native": checkpoint,
        "native from hf": tmp_path / "hf",
        "hf from native": tmp_path / "native",
        "hf from hf": tmp_path / "hf",
        "native from native": tmp_path / "native",
        "hf from run": tmp_path / "run",
    }
    for target, source in ways.items():
        run(source, tmp_path / target, target.split()[0], max_shard_gb=2e-5)
        assert_holds(tmp_path / target, model)
        assert (tmp_path / target / INDEX).exists()
        fresh = make_model(SMALL, device="cpu")
        load_weights(fresh, tmp_path / target)
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert not list(tmp_path.glob(".*"))


def test_a_native_folder_says_what_it_takes_to_build_the_model(tmp_path):
    run(save(make(), tmp_path), tmp_path / "native", "native")
    config = yaml.safe_load((tmp_path / "native" / "config.yaml").read_text())
    expected = compose(SMALL)
    assert config["model"] == expected["model"] | {"vocab_size": 320}
    assert config["mixer"] == {name: expected["mixer"][name] for name in ("kda", "mla")}
    assert config["tokens"] == {"bos": None, "eos": 256, "pad": 257, "length": None}


@pytest.mark.parametrize("format", ["hf", "native"])
def test_bf16_spares_decays_and_the_routers_correction(tmp_path, format):
    model = make()
    target = run(save(model, tmp_path), tmp_path / "out", format, dtype="bf16")
    state = model.state_dict()
    weights = open_weights(target)
    fp32 = {name for name in state if weights.get(name).dtype == torch.float32}
    assert fp32 == {n for n in state if n.endswith(("gate.log_rate", "gate.bias", "router.bias"))}
    assert len(fp32) == 2 * 2 + 2
    for name in state:
        assert torch.equal(weights.get(name), state[name].to(weights.get(name).dtype)), name
    if format == "hf":
        assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
        shards = ShardReader(target)
        assert all(
            (shards.get(n).dtype == torch.float32) == n.endswith(FP32) for n in shards.shapes
        )
    back = run(target, tmp_path / "back", format, dtype="fp32")
    assert all(open_weights(back).get(name).dtype == torch.float32 for name in state)


def test_tokenizer_files_travel_along(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"]
    for name in [*names, "generation_config.json", "notes.txt"]:
        (folder / name).write_text(name)
    data = compose(SMALL)["data"] | {"tokenizer": str(folder / "tokenizer.json")}
    checkpoint = save(make(), tmp_path, data=data)
    source = checkpoint
    for target in ("native", "hf"):
        source = run(source, tmp_path / target, target)
        assert (source / "chat_template.jinja").read_text() == "chat_template.jinja"
        assert {p.name for p in source.iterdir()} & {"notes.txt", *names} == set(names)


def test_a_tokenizer_file_of_any_name_stays_that_of_the_run(tmp_path):
    other = Path(hugging_face(tmp_path)) / "tokenizer.json"
    mine = other.with_name("mine.json")
    mine.write_text(other.read_text())
    other.write_text("{}")
    data = compose(SMALL)["data"] | {"tokenizer": str(mine)}
    source = save(make(), tmp_path / "run", data=data)
    assert tokenizer_of("checkpoint", str(source)) == str(mine)
    words = build_tokenizer(str(mine)).vocabulary()
    for target in ("native", "hf"):
        source = run(source, tmp_path / target, target)
        assert tokenizer_of("checkpoint", str(source)) == str(source)
        assert build_tokenizer(str(source)).vocabulary() == words


def test_a_checkpoint_whose_tokenizer_is_gone_converts_and_asks_for_one(tmp_path):
    gone = str(tmp_path / "gone" / "tokenizer.json")
    source = save(make(), tmp_path, data=compose(SMALL)["data"] | {"tokenizer": gone})
    target = run(source, tmp_path / "hf", "hf")
    assert json.loads((target / "config.json").read_text())["eos_token_id"] is None
    with pytest.raises(ConfigError, match=rf"^init_from=.*tokenizer {gone} is not there; allowed"):
        tokenizer_of("init_from", str(source))


def test_a_run_keeps_what_its_weights_stated_of_tokens(tmp_path):
    """Ids that its tokenizer does not have, all ends of a text, and the length, unless it read
    longer rows."""
    stated = {"bos": 3, "eos": [256, 7], "pad": None, "length": 64}
    for name, seq_len, tokens, expected in (
        ("short", 32, stated, {"bos": 3, "eos": [256, 7], "pad": 257, "length": 64}),
        ("long", 96, stated | {"eos": 7}, {"bos": 3, "eos": 256, "pad": 257, "length": 96}),
        ("own", 96, {}, {"bos": None, "eos": 256, "pad": 257, "length": 96}),
    ):
        read = {"data.stages[0].seq_len": 16, "data.stages[1].seq_len": seq_len, "data.seed": 200}
        progress = {"stream": {"made_of": read}}
        source = save(make(), tmp_path / name, progress=progress, tokens=tokens)
        assert open_weights(source).config["tokens"] == expected
        source = run(source, tmp_path / f"{name} hf", "hf")
        assert open_weights(source).config["tokens"] == expected


def test_weights_without_a_tokenizer_are_of_bytes_only_if_they_have_as_many_words(tmp_path):
    for words, overrides in ((320, SMALL), (384, [*SMALL, "model.vocab_size=384"])):
        folder = tmp_path / str(words)
        source = save(make(overrides), folder / "run", overrides)
        assert tokenizer_of("checkpoint", str(source)) == "bytes"  # which the run says itself
        run(source, folder / "hf", "hf")
    assert tokenizer_of("checkpoint", str(tmp_path / "320" / "hf")) == "bytes"
    line = r"^checkpoint=.*hf: no tokenizer\.json beside the weights; allowed: tokenizer=PATH"
    with pytest.raises(ConfigError, match=line):
        tokenizer_of("checkpoint", str(tmp_path / "384" / "hf"), other="tokenizer")


def test_an_existing_target_is_refused(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(ConfigError, match=r"target=.*exists already; allowed: a new folder"):
        run(tmp_path, tmp_path / "target", "hf")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Hugging Face folder with one tensor a file."""
    folder = tmp_path_factory.mktemp("exported")
    return run(save(make(), folder), folder / "hf", "hf", max_shard_gb=1e-9)


def remove_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, r"model-00002-of-\d+\.safetensors is not a whole safetensors file"),
        (remove_tensor, r"does not fit its config\.json: 1 missing \(lm_head\.weight\)"),
        (edit_config(first_k_dense_replace=3), r"missing \(model\.layers\.1\.mlp.*unexpected"),
        (
            edit_config(vocab_size=64),
            r"misshapen \(model\.embed_tokens\.weight is \[320, 32\], not",
        ),
        (edit_config(model_type="gpt2"), r"config\.json: model_type is 'gpt2'; known are"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "no weights in .*; allowed: "),
    ],
)
def test_a_damaged_hugging_face_folder_is_one_clear_line(exported, tmp_path, harm, reason):
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    harm(folder)
    model = make_model(SMALL, device="cpu")
    with pytest.raises(ConfigError, match=reason) as error:
        load_weights(model, folder)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_fill_nothing(tmp_path):
    checkpoint = save(make(), tmp_path)
    model = make([*SMALL, "model.num_layers=4"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"holds another model .*: \d+ missing \(layers\.3\."):
        load_weights(model, checkpoint)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoint = save(make(), tmp_path)
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"__0_0\.distcp is damaged: 0 bytes"):
        open_weights(checkpoint)


def test_weights_keep_the_models_precision(tmp_path):
    checkpoint = save(make(), tmp_path)
    model = make_model(SMALL, device="cpu").double()
    load_weights(model, checkpoint)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.equal(model.norm.weight.float(), make().norm.weight)


def test_the_command_line_ends_with_code_2_and_one_line():
    command = ("tests.script", "scripts/convert.py", "source=nowhere", "target=x", "format=hf")
    ended = alone(*command)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: source=nowhere: no weights in nowhere; allowed: ")
    assert ended.stderr.count("\n") == 1
