"""A mixture is evaluated source by source: the figures of each are those of it alone."""

import pytest

from tests.trainer.evals.helpers import PROSE
from tests.trainer.tiny import build
from trainer.errors import ConfigError

LENGTHS = {"long": (90, 40, 200, 150, 60), "short": (9, 14, 22, 30, 8), "none": (50,)}
EVALUATION = [
    *("eval.every=1", "eval.tasks=[perplexity,position,copy]", "data.seq_len=32"),
    *("tasks.position.length=30", "tasks.copy.lengths=[25]", "tasks.copy.samples=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, lengths in LENGTHS.items():
        (folder / name).mkdir()
        for i, length in enumerate(lengths):
            (folder / name / str(i)).write_text(f"{i} " + (name + PROSE * 3)[: length - 3])
    return folder


def evaluated(folder, *words: str) -> dict:
    return build(folder, "data.path=null", *EVALUATION, *words).evaluate()


def section(folder, name: str, held_out: float) -> str:
    return f"{name}:{{source:files,path:'{folder / name}',eval_fraction:{held_out}}}"


def test_each_source_has_the_figures_that_it_has_alone(folder):
    """Without those that hold out nothing, or nothing of a task's length."""
    sections = [section(folder, name, 0.7 * (name != "none")) for name in LENGTHS]
    found = evaluated(folder, "data=mixture", f"data.sources={{{','.join(sections)}}}")
    tasks = {"long": "perplexity,position,copy", "short": "perplexity,copy"}
    expected = {}
    for name, asked in tasks.items():
        words = [f"data.path={folder / name}", "data.eval_fraction=0.7", f"eval.tasks=[{asked}]"]
        alone = evaluated(folder, *words)
        for key, value in alone.items():
            prefix = next((p for p in ("eval_position_", "eval_copy_") if key.startswith(p)), None)
            if prefix:
                expected[key.replace(prefix, f"{prefix}{name}_")] = value
    assert {"eval_position_long_loss_1", "eval_copy_short_accuracy"} <= expected.keys()
    assert {key: x for key, x in found.items() if key in expected} == pytest.approx(expected)
    rest = found.keys() - expected.keys()
    assert rest == {"eval_loss", "eval_perplexity", "eval_tokens"}


def test_where_no_source_has_what_a_task_needs_the_first_says_so(folder):
    sections = [section(folder, name, 0.0) for name in ("none", "short")]
    with pytest.raises(ConfigError, match=r"tasks\.position\.length=30: no document"):
        evaluated(folder, "data=mixture", f"data.sources={{{','.join(sections)}}}")
