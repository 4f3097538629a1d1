"""The short form; README tells of the long one."""

from tests.kills.harness import Harness


def test_kills_at_every_point_in_either_mode_change_nothing(tmp_path):
    report = Harness(tmp_path, ranks=2, overrides=["data.batch_size=2"]).run(9)
    assert sum(report.kills.values()) == 9 and report.runs_ended_alike >= 2
