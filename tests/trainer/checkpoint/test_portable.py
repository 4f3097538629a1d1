"""Folders with their own code: transformers alone computes what we do, and they come back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from models.sequence import SequenceInfo
from tests.models.build import MIXERS, make_model, randomise
from tests.trainer.checkpoint.test_convert import assert_holds, run, save
from trainer.checkpoint.weights import open_weights
from trainer.generation import generate

SIZES = ["model.d_model=24", "model.ffn.hidden=32"]
MODELS = {
    # Every mixer there is, dense.
    "mixers": [
        "model=kimi_linear",
        "model.moe=null",
        f"model.pattern=[{','.join(MIXERS)}]",
        f"model.num_layers={len(MIXERS)}",
        "model.tie_embeddings=true",
        "model.residual_block=2",
    ],
    # Kimi Linear but for its gates.
    "gates": [
        "model=kimi_linear",
        "model.num_layers=2",
        "model.pattern=[kda,mla]",
        "model.moe={num_experts: 3, top_k: 2, hidden: 16, shared_hidden: 16, routed_scaling: 2.0}",
        "mixer.kda.gate_lower_bound=-5.0",
        "mixer.kda.full_rank_gate=true",
        "mixer.mla.output_gate=true",
    ],
}


def write(folder: Path, name: str) -> Path:
    """A folder in the form of transformers, and beside it tokens, logits and what we write."""
    overrides = [*MODELS[name], *SIZES]
    model = randomise(make_model(overrides, device="cpu"))
    target = run(save(model, folder / "run" / name, overrides), folder / name, "hf")
    tokens = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens, SequenceInfo.span(2, 0, 70)) @ model.head_weight.mT
    written = torch.stack(list(generate(model, tokens[:, :20], tokens=6)), dim=1)
    torch.save((tokens, logits, torch.cat([tokens[:, :20], written], 1)), folder / f"{name}.pt")
    assert_holds(target, model)
    assert_holds(run(target, folder / "back" / name, "native"), model)
    return target


def test_transformers_alone_computes_what_we_do(tmp_path):
    folders = [write(tmp_path, name) for name in MODELS]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "longhaul" and config["dtype"] == "float32"
        first = (folder / "hybrid.py").read_text().splitlines()[0]
        assert first.startswith("# models/hybrid.py of Longhaul ")
    script = Path(__file__).with_name("portable_alone.py")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    # -I: neither the working directory nor the script's is searched for modules.
    command = [sys.executable, "-I", "-W", "ignore", script, *folders]
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for folder in folders:
        saved, written = (
            open_weights(x) for x in (folder.with_name(f"{folder.name}_saved"), folder)
        )
        assert saved.config == written.config
        assert all(torch.equal(saved.get(name), written.get(name)) for name in written.shapes)
