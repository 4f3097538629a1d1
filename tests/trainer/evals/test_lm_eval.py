"""lm-evaluation-harness through our model, against whole forward passes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from models.sequence import SequenceInfo
from tests.trainer.tiny import build
from trainer.errors import ConfigError
from trainer.evals.lm_eval import Harness
from trainer.evaluate import writer

EOS = 256
OPTIONS = {"num_fewshot": None, "limit": None, "max_length": None, "include_path": None}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{written}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    return build(folder, "trainer.precision=fp64", "model.init_std=0.3", "data.seq_len=64")


@pytest.fixture(scope="module")
def bench(trainer):
    return dataclasses.replace(trainer.suite.bench, write=writer(trainer.engine))


@pytest.fixture(scope="module")
def harness(bench):
    pytest.importorskip("lm_eval")
    from trainer.evals.harness import HarnessModel

    return lambda max_length=None: HarnessModel(bench, max_length=max_length)


def log_probabilities(trainer, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary], of what follows each."""
    model = trainer.engine.model.eval()
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), SequenceInfo.span(1, 0, len(ids)))
        return (hidden @ model.head_weight.mT)[0].log_softmax(-1)


def likelihood(trainer, context: bytes, continuation: bytes) -> tuple[float, bool]:
    ids = [*context] or [EOS]
    rows = log_probabilities(trainer, [*ids, *continuation])[len(ids) - 1 : -1]
    chosen = rows[range(len(continuation)), list(continuation)]
    greedy = rows.argmax(-1).tolist() == list(continuation)
    return float(chosen.sum()), greedy


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


def written(trainer, prompt: bytes, tokens: int) -> str:
    """Greedily."""
    ids = [*prompt]
    for _ in range(tokens):
        ids.append(int(log_probabilities(trainer, ids)[-1].argmax()))
    return bytes(i for i in ids[len(prompt) :] if i < 256).decode(errors="replace")


def test_continuations(trainer, harness):
    greedy = int(log_probabilities(trainer, [*b"the"])[-1].argmax())
    pairs = [("the", " quick brown"), ("", "fox"), ("two words ", "more"), ("the", "a" * 90)]
    pairs += [("the", bytes([greedy]).decode())] if greedy < 128 else []
    got = harness().loglikelihood(requests(*pairs))
    for (context, continuation), (value, hit) in zip(pairs, got, strict=True):
        moved = context[len(context.rstrip()) :]
        value_, hit_ = likelihood(
            trainer, context.rstrip().encode(), (moved + continuation).encode()
        )
        assert value == pytest.approx(value_, rel=1e-9) and hit == hit_
    assert len({round(value, 6) for value, _ in got}) == len(got)


def test_a_long_context_keeps_its_end(trainer, harness):
    model = harness(max_length=8)
    ((value, _),) = model.loglikelihood(requests(("a long context", " end")))
    assert value == pytest.approx(likelihood(trainer, b"ntext", b" end")[0], rel=1e-9)
    assert model.cut == 1


def test_whole_texts(trainer, harness):
    text = b"a text of twenty-odd bytes"
    whole, windows = likelihood(trainer, b"", text)[0], 0.0
    ids = [EOS, *text]
    for start in range(0, len(text), 10):  # the last window has as much context as it may
        end = min(start + 10, len(text))
        rows = log_probabilities(trainer, ids[end - 10 : end] if start else ids[:end])
        asked = ids[start + 1 : end + 1]
        windows += float(rows[-len(asked) :][range(len(asked)), asked].sum())
    assert harness().loglikelihood_rolling(requests((text.decode(),))) == [
        pytest.approx(whole, rel=1e-9)
    ]
    got = harness(max_length=10).loglikelihood_rolling(requests(("other",), (text.decode(),)))
    assert got[1] == pytest.approx(windows, rel=1e-9) and windows != pytest.approx(whole, rel=1e-6)


def test_writes_greedily_up_to_a_stop(trainer, harness):
    text = written(trainer, b"the quick", 9)
    stop = text[4:6]
    got = harness().generate_until(
        requests(("the quick", {"max_gen_toks": 9}), ("the quick", {"until": [stop]}))
    )
    assert got == [text, text[: text.index(stop)]]


def test_a_task_of_ones_own(trainer, bench, harness, tmp_path):
    rows = [
        {"question": "one", "choices": [" two", " three"], "written": written(trainer, b"one", 6)},
        {"question": "four", "choices": [" five", " six"], "written": "no"},
    ]
    for row in rows:
        values = [likelihood(trainer, row["question"].encode(), c.encode()) for c in row["choices"]]
        row["answer"] = int(values[1] > values[0])
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in (("choose_it", CHOICE), ("write_it", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    options = OPTIONS | {"include_path": str(tmp_path)}
    figures = Harness(**options, tasks=["choose_it", "write_it"]).run(bench).figures
    assert figures["choose_it_acc"] == 1.0 and figures["write_it_exact_match"] == 0.5
    with pytest.raises(ConfigError, match=r"tasks\.lm_eval\.tasks: the harness has no nosuch; "):
        Harness(**options, tasks=["choose_it", "nosuch"]).run(bench)
    with pytest.raises(ConfigError, match=r"one writes text, which wants a whole model on every"):
        shared = dataclasses.replace(bench, write=None)
        Harness(**options, tasks=["write_it"]).run(shared)


def test_names_are_needed():
    with pytest.raises(ValueError, match=r"tasks is \[\]; allowed: names of tasks"):
        Harness(**OPTIONS, tasks=[])
