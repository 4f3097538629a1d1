"""Tables, files, options, and the command line."""

import json

import pytest

from benchmarks import report
from benchmarks.report import Column
from tests.benchmarks.conftest import settings
from tests.launch import alone


def test_columns_line_up_and_empty_ones_go() -> None:
    columns = (Column("name", "mixer"), Column("ms", "ms", ",.1f"), Column("note", "note"))
    rows = [{"name": "kda", "ms": 1234.56}, {"name": "attention"}]
    assert report.table(rows, columns) == "mixer           ms\nkda        1,234.6\nattention"
    assert report.table([{"note": "no"}], columns) == "note\nno"


def test_file(tmp_path) -> None:
    report.write(tmp_path / "new" / "a.json", {"rows": [{"seconds": 1.5}]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"rows": [{"seconds": 1.5}]}


@pytest.mark.parametrize(
    "changed",
    [
        {"lengths": []},
        {"lengths": [4, 4]},
        {"lengths": [1, 4]},
        {"dtypes": []},
        {"repeats": 0},
        {"shares": [2]},
    ],
)
def test_options_out_of_range(changed) -> None:
    (name,) = changed
    with pytest.raises(ValueError, match=f"^{name}=.*allowed:"):
        settings(**changed)


def test_unknown_suite_exits_with_2_and_lists_the_suites() -> None:
    done = alone("tests.script", "scripts/benchmark.py", "suite=speed")
    assert done.returncode == 2
    line = "error: suite=speed: allowed: train, mixers, attention, checkpoint, activations\n"
    assert done.stderr == line and not done.stdout
