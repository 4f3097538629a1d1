"""What upcycling starts from and recovers: python -m benchmarks.upcycling runs=DIR [output=FILE].

A small Llama is trained on the standard library. It is converted to latent attention from three
starts with one size of cache, and to a hybrid with Mamba-2 through both students, each distilled
over as many tokens; a hybrid from scratch trains over as many as its pipeline does in all. Every
stage has a folder below `runs` and is left out where that is complete.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.job import ROOT
from benchmarks.machine import facts
from benchmarks.report import Column, Row, table, write

LLAMA = [
    "model=transformer",
    "model.moe=null",
    "model.ffn.hidden=512",
    "model.d_model=192",
    "model.num_layers=6",
    "mixer.gqa.num_heads=4",
    "mixer.gqa.num_kv_heads=2",
    "mixer.gqa.head_dim=48",
]


def _batch(rows: int) -> list[str]:
    return ["data.seq_len=512", f"data.batch_size={rows}", f"trainer.micro_batch_size={rows}"]


TAUGHT = [*_batch(2), "trainer.steps=12000", "optim.lr=2e-3", "schedule.warmup=0.02"]
# Latent and rotary key, 48 of the Llama's 192 values a token and layer.
STARTS = {
    "zebra": ["recipe.rope=zebra", "recipe.low_rank=svd", "recipe.rope_dim=16"],
    "select": ["recipe.rope=select", "recipe.low_rank=pca", "recipe.rope_dim=8"],
    "rorope": ["recipe.rope=rorope", "recipe.low_rank=pca", "recipe.rope_dim=16"],
}
LATENT = ["recipe.kv_rank=32", "recipe.q_rank=null"]
MLA_LAYERS = 4
# Over few tokens, steps of one row learn the most: students and what they are held to take those.
STEPS, RATES = {"ild": 160, "kd": 320}, {"ild": "1e-3", "kd": "5e-4"}
SCRATCH_RATES = ("5e-4", "1e-3", "2e-3")
# A part of what training held out.
HELD_OUT = ["data=stdlib", "split=eval", "data.eval_fraction=0.004"]


class Bench:
    """Commands of the project, and the folders that they leave."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.teacher = runs / "teacher"

    def train(self, name: str, *overrides: str) -> Path:
        folder = self.runs / name
        status = folder / "status.json"
        if not status.exists() or json.loads(status.read_text())["outcome"] != "done":
            self._script("train", *overrides, f"run_dir={folder}")
        return folder

    def convert(self, name: str, source: Path, *overrides: str) -> Path:
        target = self.runs / name
        if not target.exists():
            self._script("convert", f"source={source}", f"target={target}", *overrides)
        return target

    def distil(self, name: str, source: Path, objective: str) -> Path:
        keys = [f"objective={objective}", f"objective.teacher={self.teacher}"]
        length = _length(STEPS[objective], RATES[objective])
        return self.train(name, "model=init_from", f"init_from={source}", *keys, *length)

    def select(self, name: str, base: Path, other: Path) -> Path:
        target = self.runs / f"{name}.json"
        models = [f"teacher={self.teacher}", f"base={base}", f"other={other}"]
        size = [f"count={MLA_LAYERS}", "data.seq_len=512", "rows=16"]
        self._script("select_layers", *models, *size, f"target={target}")
        return target

    def loss(self, folder: Path) -> float:
        kept = self.runs / "losses" / f"{folder.relative_to(self.runs)}.json"
        if not kept.exists():
            printed = self._script("evaluate", f"checkpoint={folder}", *_batch(4), *HELD_OUT)
            write(kept, json.loads(printed.splitlines()[-1]))
        return json.loads(kept.read_text())["loss"]

    def _script(self, name: str, *arguments: str) -> str:
        command = [sys.executable, f"scripts/{name}.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout


def starts(bench: Bench) -> list[Row]:
    """Latent attention in all layers, from each start."""
    rows = []
    for name, keys in STARTS.items():
        start = bench.convert(f"{name}_start", bench.teacher, "recipe=zebra_mla", *LATENT, *keys)
        layers = bench.distil(f"{name}_ild", start, "ild")
        logits = bench.distil(f"{name}_kd", layers, "kd")
        losses = {"start": start, "ild": layers, "kd": logits}
        rows.append({"model": f"mla, {name}", **_losses(bench, losses)})
    return rows


def hybrid(bench: Bench) -> list[Row]:
    """The stages of Zebra-Llama with the better start, and the same model from scratch."""
    mla = bench.runs / "rorope_ild"
    start = bench.convert("mamba2_start", bench.teacher, "recipe=zebra_mamba2")
    mamba2 = bench.distil("mamba2_ild", start, "ild")
    chosen = bench.select("selection", mamba2, mla)
    parts = [f"recipe.other={mla}", f"recipe.selection={chosen}"]
    joined = bench.convert("hybrid_start", mamba2, "recipe=assemble", *parts)
    taught = bench.distil("hybrid_kd", joined, "kd")
    rows: list[Row] = [{"model": "hybrid", **_losses(bench, {"start": joined, "kd": taught})}]
    for rate in SCRATCH_RATES:
        keys = _length(2 * STEPS["ild"] + STEPS["kd"], rate)
        plain = bench.train(f"hybrid_scratch_{rate}", *LLAMA, *_layers(joined), *keys)
        rows.append({"model": f"hybrid from scratch, lr {rate}", "kd": bench.loss(plain)})
    return rows


def _length(steps: int, rate: str) -> list[str]:
    keys = [f"trainer.steps={steps}", "schedule.warmup=0.1", f"optim.lr={rate}"]
    return [*_batch(1), *keys, "checkpoint.every=0"]


def _layers(folder: Path) -> list[str]:
    """What makes an untrained model of the layers of this one."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    mixers = {name: config["mixer"][name] for name in config["model"]["pattern"]}
    keys = [
        f"mixer.{name}.{key}={json.dumps(value)}"
        for name, section in mixers.items()
        for key, value in section.items()
        if not key.startswith("_")
    ]
    return [f"model.pattern={json.dumps(config['model']['pattern'])}", *keys]


def _losses(bench: Bench, folders: Mapping[str, Path]) -> Row:
    return {stage: bench.loss(folder) for stage, folder in folders.items()}


def main(arguments: Sequence[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    bench = Bench(Path(options["runs"]).absolute())
    bench.train("teacher", *LLAMA, *TAUGHT, "checkpoint.every=0")
    rows = [{"model": "teacher", "kd": bench.loss(bench.teacher)}]
    rows += [*starts(bench), *hybrid(bench)]
    stages = [Column(stage, f"loss, {stage}", ".4f") for stage in ("start", "ild", "kd")]
    print(table(rows, [Column("model", "model"), *stages]))
    if "output" in options:
        command = f"python -m benchmarks.upcycling {' '.join(arguments)}"
        write(Path(options["output"]), {**facts("cpu", 1, command), "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
