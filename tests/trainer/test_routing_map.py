"""The map of a text's chunks: who keeps what, as a picture and as coloured text."""

import sys

import numpy as np
import pytest
import torch
import yaml

from models.checkpoints.shards import write_shards
from models.ops.routed_grid import chunk_grid
from models.sequence import SequenceInfo
from tests.models.build import compose, make_model, randomise
from tests.trainer.tiny import MODEL
from trainer import main
from trainer.console import close_logging
from trainer.data import build_tokenizer
from trainer.routing_map import Routed, page, route

SHAPE = [*MODEL, "model=nats_l", "model.pattern=[kda,nats_l]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Native folders of random weights, routed and not, and a text."""
    folder = tmp_path_factory.mktemp("routing")
    for name, more in (("routed", []), ("plain", ["model.pattern=[kda]"])):
        (folder / name).mkdir()
        model = randomise(make_model([*SHAPE, *more], device="cpu"))
        write_shards(folder / name, iter(model.state_dict().items()), max_bytes=1e9)
        config = compose([*SHAPE, *more])
        sections = {key: config[key] for key in ("model", "mixer")}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(sections))
    (folder / "text").write_text("a < b; " * 30)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """Runs the command in this process; -> what it prints, or its one line of error."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*words: str, checkpoint: str = "routed", text: str = "text", code: int = 0) -> str:
        given = [f"checkpoint={folder / checkpoint}", f"text={folder / text}", *words]
        monkeypatch.setattr(sys, "argv", ["inspect_routing.py", *given])
        with pytest.raises(SystemExit) as stop:
            main.command("inspect_routing", main.inspect_routing)
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        return err if code else out

    yield run
    close_logging()


def test_a_picture_and_the_shares(run, folder):
    out = run(f"target={folder / 'map.png'}", "tokens=100")
    assert [line.split(":")[0] for line in out.splitlines()] == ["layer 1", "layer 3"]
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_in_colours(run, folder):
    run(f"target={folder / 'map.html'}")
    html = (folder / "map.html").read_text()
    assert html.count("<span") == -(-210 // 8) and "a &lt; b" in html


def test_a_map_is_what_the_routers_do():
    model = randomise(make_model(SHAPE, device="cpu"))
    ids = torch.randint(256, (50,), generator=torch.Generator().manual_seed(0))
    inputs = []
    model.layers[3].mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    layers = route(model, ids)
    grid = chunk_grid(SequenceInfo.span(1, 0, 50), 8)
    keep = model.layers[3].mixer.router(grid.mean(inputs[0]), grid).keep[0].T > 0
    assert list(layers) == [1, 3] and layers[3].chunk == 8
    assert np.array_equal(layers[3].kept, keep.numpy()) and 0 < keep.double().mean() < 1


def test_chunks_of_two_lengths_share_a_page():
    short, long = np.array([[True, False, False, True]]), np.array([[True, False]])
    html = page(
        {1: Routed(short, 2), 5: Routed(long, 4)}, list(b"abcdefgh"), build_tokenizer("bytes")
    )
    assert [part.split('"')[0] for part in html.split('title="')[1:]] == [
        "0: 100% kept, by 1.0 5.0",
        "2: 50% kept, by 5.0",
        "4: 0% kept, by none",
        "6: 50% kept, by 1.0",
    ]


@pytest.mark.parametrize(
    ("words", "keywords", "message"),
    [
        (["target=map.pdf"], {}, "target=map.pdf: allowed: a name that ends in .png or .html"),
        (["target=map.png", "tokens=0"], {}, "tokens=0: allowed: 1 or more"),
        (["target=map.png"], {"text": "none"}, "No such file or directory; allowed: a file"),
        (["target=map.png"], {"checkpoint": "plain"}, "a model with nats_l in its pattern"),
    ],
)
def test_what_cannot_be_is_named(run, words, keywords, message):
    assert message in run(*words, code=2, **keywords)
