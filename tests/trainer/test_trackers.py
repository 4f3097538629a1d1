"""tensorboard and wandb: what they get, and that a run can do without them."""

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import full_disk
from trainer.errors import ConfigError
from trainer.evals.pictures import draw_heat_map
from trainer.trackers import Spared, TensorBoard, Wandb, check_wandb_login


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


class WandbRun:
    """As wandb keeps it: a row at each of its own steps, which never go back."""

    def __init__(self, step: int) -> None:
        self.step, self.rows = step, {}

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict, step: int) -> None:
        assert step >= max(self.rows, default=self.step)
        self.rows.setdefault(step, {}).update(values)

    def finish(self) -> None: ...


@pytest.fixture
def starts(monkeypatch):
    """The wandb runs that were asked for, those refused too; `starts.refused` are the modes."""

    class Starts(list[dict]):
        refused: tuple[str, ...] = ()
        step = 0

    def init(**keys) -> WandbRun:
        starts.append(keys)
        if keys["mode"] in starts.refused:
            raise wandb.errors.CommError("no answer\nfrom there.")
        return WandbRun(starts.step)

    starts = Starts()
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    return starts


def open_wandb(run_dir, mode="online") -> Wandb:
    return Wandb(run_dir, mode=mode, project="p", config={})


def test_wandb_gets_the_steps_of_a_run_that_went_back(tmp_path, starts):
    draw_heat_map(tmp_path / "map.png", np.eye(2), columns=[16, 32], rows=[0.0, 1.0], title="")
    starts.step = 3  # of its own, the next one
    board = open_wandb(tmp_path)
    for step in (2, 3, 6, 5, 6, 7, 9):
        if step % 3 == 0:
            board.show("eval_niah", tmp_path / "map.png", step)
        board.log({"step": step, "loss": 0.5, "mfu": None})
    board.close()
    rows = board._run.rows
    assert [*rows] == [3, 4, 6, 7, 8, 9, 10]
    assert [row["step"] for row in rows.values()] == [2, 3, 6, 5, 6, 7, 9]
    assert all(("eval_niah" in row) == (row["step"] % 3 == 0) for row in rows.values())
    assert all("loss" in row and "mfu" not in row for row in rows.values())


def test_a_new_run_that_wandb_does_not_take_is_refused(tmp_path, starts, monkeypatch):
    starts.refused = ("online",)
    line = r"^logging\.wandb=online: no answer from there; allowed: off, offline, or online behind"
    for _ in range(2):  # it stays new
        with pytest.raises(ConfigError, match=line):
            open_wandb(tmp_path)
    monkeypatch.setattr(wandb, "login", lambda verify: wandb.init(mode="online"))
    with pytest.raises(ConfigError, match=line):
        check_wandb_login(tmp_path)


def test_a_run_that_wandb_knows_goes_on_offline(tmp_path, starts, monkeypatch, caplog):
    (tmp_path / "wandb_id").touch()  # as a crash may leave it
    open_wandb(tmp_path)
    starts.refused = ("online",)
    monkeypatch.setattr(wandb, "login", lambda verify: wandb.init(mode="online"))
    check_wandb_login(tmp_path)
    open_wandb(tmp_path)
    assert [start["mode"] for start in starts] == ["online", "online", "offline"]
    assert {start["id"] for start in starts} == {(tmp_path / "wandb_id").read_text()}
    assert [record.getMessage() for record in caplog.records] == [
        "logging.wandb=online: no answer from there; offline until the next start"
    ]
