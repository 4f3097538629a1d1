"""Ten losses of every small preset, as text: a refactor changes no line of tests/golden.

To write the files anew after a change that is meant to change training:
    python -m tests.trainer.test_golden
"""

import tempfile
from pathlib import Path

import pytest
import torch

from parallel.mesh import Mesh
from tests.models.build import compose
from tests.trainer.tiny import overrides
from trainer.build import build_trainer

GOLDEN = Path(__file__).parents[1] / "golden"
# Preset -> what it lacks, beside all that tests.trainer.tiny makes small.
MODELS: dict[str, tuple[str, ...]] = {
    "kimi_linear": (),
    "kimi_linear_attnres": (),
    "transformer": (),
    "mla": (),
    "gdn_hybrid": (),
    "nats_l": (),
    "lightning": (),
    "mamba2": ("model.ffn", "model.moe"),
    "zebra_llama": ("model.moe", "mixer.mamba2"),
}


def losses(model: str, folder: Path) -> list[float]:
    """fp64: equal to far more digits than are kept, on any machine and in any micro-batches."""
    more = ["trainer.precision=fp64", "trainer.steps=10", "trainer.micro_batch_size=4"]
    words = overrides(folder, f"model={model}", *more)
    section = compose([word for word in words if not word.startswith(MODELS[model])])
    mesh = Mesh(device=torch.device("cpu"))
    trainer = build_trainer(section, mesh=mesh, run_dir=folder)
    return [trainer.train_step()["loss"] for _ in range(10)]


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_the_golden_ones(model, tmp_path):
    golden = [float(line) for line in (GOLDEN / f"{model}.txt").read_text().split()]
    assert losses(model, tmp_path) == pytest.approx(golden, rel=1e-6)


if __name__ == "__main__":
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"{loss:.9f}\n" for loss in losses(model, Path(folder))]
        (GOLDEN / f"{model}.txt").write_text("".join(lines))
