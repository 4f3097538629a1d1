"""A trace of the steps that were asked for, on the ranks that were asked for, whatever ends."""

import json

from tests.trainer.tiny import build

TRACE = "trace_rank00000.json"
SMALL = ["model=transformer", "model.d_model=8", "model.num_layers=1", "trainer.micro_batch_size=4"]


def optimizer_steps(folder) -> int:
    events = json.loads((folder / "run" / "profile" / TRACE).read_text())["traceEvents"]
    return sum(str(event.get("name")).startswith("Optimizer.step#") for event in events)


def test_a_range_of_steps(tmp_path):
    build(tmp_path, *SMALL, "trainer.profile.steps=[2,3]").run()
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == [TRACE]
    assert optimizer_steps(tmp_path) == 2


def test_a_run_that_begins_late_and_ends_early(tmp_path):
    build(tmp_path, *SMALL, "trainer.steps=2").run()
    build(tmp_path, *SMALL, "trainer.profile.steps=[1,9]").run()
    assert optimizer_steps(tmp_path) == 2


def test_other_ranks_and_other_steps_write_nothing(tmp_path):
    build(tmp_path, *SMALL, "trainer.steps=2", "trainer.profile={steps:[1,1],ranks:[]}").run()
    build(tmp_path, *SMALL, "trainer.profile.steps=[1,2]").run()
    assert not (tmp_path / "run" / "profile").exists()
