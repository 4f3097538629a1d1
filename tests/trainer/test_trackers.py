"""tensorboard and wandb: what they get, and that a run can do without them."""

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import full_disk
from trainer.evals.pictures import draw_heat_map
from trainer.trackers import Spared, TensorBoard


def events(run_dir) -> EventAccumulator:
    read = EventAccumulator(str(run_dir / "tensorboard"))
    return read.Reload()


def test_tensorboard_gets_every_number_and_picture(tmp_path):
    board = TensorBoard(tmp_path)
    draw_heat_map(tmp_path / "map.png", np.eye(2), columns=[16, 32], rows=[0.0, 1.0], title="")
    board.show("eval_niah", tmp_path / "map.png", 3)
    board.log({"step": 3, "loss": 1.5, "mfu": None})
    board.close()
    shown = events(tmp_path)
    assert shown.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(3, 1.5)]
    assert [(e.step, e.width > 300) for e in shown.Images("eval_niah")] == [(3, True)]


def test_tensorboard_shows_the_steps_of_the_run_that_went_back_and_no_others(tmp_path):
    draw_heat_map(tmp_path / "map.png", np.eye(2), columns=[16, 32], rows=[0.0, 1.0], title="")
    for start, steps in ((1, [1, 2, 3, 2, 3]), (2, [3])):  # rolled back; killed, and resumed
        board = TensorBoard(tmp_path)
        for i, step in enumerate(steps, start=10 * start):
            if step > 1:
                board.show("eval_niah", tmp_path / "map.png", step)
            board.log({"step": step, "loss": i})
        board.close()
    shown = events(tmp_path)
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 10), (2, 13), (3, 20)]
    assert [e.step for e in shown.Images("eval_niah")] == [2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("while_open", [True, False])
def test_a_full_disk_costs_tensorboard_and_not_the_run(tmp_path, caplog, while_open):
    draw_heat_map(tmp_path / "map.png", np.eye(2), columns=[16, 32], rows=[0.0, 1.0], title="")
    board = Spared(TensorBoard(tmp_path))
    board.log({"step": 1, "loss": 1.5})
    with full_disk(5):
        if while_open:
            for step in range(2, 40):  # more than wait for the thread that writes
                board.log({"step": step, "loss": 1.5})
            board.show("eval_niah", tmp_path / "map.png", 40)
        else:
            board.log({"step": 2, "loss": 1.5})
        board.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "tensorboard: [Errno 27] File too large; nothing more goes there until the next start"
    ]
