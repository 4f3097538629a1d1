"""What the tasks are made of, on integers: exact lengths, answers alone labelled, and found where
they are said to be."""

import pickle
import re

import numpy as np
import pytest

from tests.trainer.data.helpers import packed, read
from tests.trainer.evals.helpers import data, hugging_face, text
from trainer.batch import IGNORE_INDEX
from trainer.data.task_rows import TaskRows
from trainer.errors import ConfigError
from trainer.evals.copy import Copying
from trainer.evals.kv import KeyValueRetrieval
from trainer.evals.mqar import MultiQueryRecall
from trainer.evals.niah import NeedleInAHaystack
from trainer.evals.synthetic import words

GRID = {"lengths": [300], "samples": 1, "seed": 0}
DEPTHS = [0.0, 0.3, 1.0]
NIAH = NeedleInAHaystack(**GRID, depths=DEPTHS, digits=5)
KV = KeyValueRetrieval(**GRID, depths=DEPTHS, digits=5)
COPY = Copying(**GRID)
MQAR = MultiQueryRecall(**GRID, pairs=None, vocabulary=64, power=0.1)
TASKS = {task.name: task for task in (NIAH, KV, COPY, MQAR)}


@pytest.fixture(scope="module", params=["bytes", "hugging face"])
def documents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    return text(folder, tokenizer="bytes" if request.param == "bytes" else hugging_face(folder))


def answer(run) -> np.ndarray:
    """The tokens that are to be predicted."""
    return run.labels[run.labels != IGNORE_INDEX]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [170, 299])
def test_lengths_are_exact_and_labels_are_next_tokens(documents, name, length, depth):
    task = TASKS[name]
    run = task.example(documents, task.draw(0, 3), length=length, depth=depth)
    assert run.tokens.shape == run.labels.shape == (length,)
    asked = np.flatnonzero(run.labels != IGNORE_INDEX)
    assert len(asked) and asked[-1] < length - 1
    assert (run.labels[asked] == run.tokens[asked + 1]).all()
    again = task.example(documents, task.draw(0, 3), length=length, depth=depth)
    assert (again.tokens == run.tokens).all() and (again.labels == run.labels).all()
    other = task.example(documents, task.draw(0, 4), length=length, depth=depth)
    assert (other.tokens != run.tokens).any()


@pytest.mark.parametrize("name", TASKS)
def test_a_start_token_is_part_of_the_length(tmp_path, name):
    """And the tokens of the documents' text are those without."""
    plain = text(tmp_path, tokenizer=hugging_face(tmp_path))
    (tmp_path / "other").mkdir()
    started = text(tmp_path, tokenizer=hugging_face(tmp_path / "other", start=True))
    assert (started.read(3, 2 * plain.tokens) == plain.read(3, 2 * plain.tokens)).all()
    task = TASKS[name]
    options = {"draw": task.draw(0, 3), "depth": 0.3}
    run = task.example(started, length=171, **options)
    options["draw"] = task.draw(0, 3)
    behind = task.example(plain, length=170, **options)
    assert run.tokens.tolist() == [0, *behind.tokens]
    assert run.labels.tolist() == [IGNORE_INDEX, *behind.labels]
    with pytest.raises(ConfigError) as error:
        task.example(started, task.draw(0, 3), length=3, depth=0.3)
    found, least = map(int, re.findall(r"(\d+) tokens hold .*allowed: (\d+)", str(error.value))[0])
    assert found == 3
    assert len(task.example(started, task.draw(0, 3), length=least, depth=0.3).tokens) == least


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_is_where_it_says(documents, depth):
    run = NIAH.example(documents, NIAH.draw(0, 1), length=300, depth=depth)
    written = documents.tokenizer.decode(run.tokens)
    key, number = re.search(
        r"What is the magic number of (\w+)\?\n.* is( \d{5})$", written
    ).groups()
    assert documents.tokenizer.decode(answer(run)) == number
    needle = documents.encode(f"The magic number of {key} is")
    windows = np.lib.stride_tricks.sliding_window_view(run.tokens, len(needle))
    first, second = np.flatnonzero((windows == needle).all(1))
    given, end = first + len(needle), first + len(needle) + len(answer(run))
    assert (run.tokens[given:end] == answer(run)).all()
    opening, ending = len(documents.encode("\n")), len(documents.encode(".\n"))
    question = len(documents.encode(f"\nWhat is the magic number of {key}?\n"))
    hay = second - question - (end + ending) + first - opening  # tokens around the needle
    assert first - opening == round(depth * hay)
    at = documents.tokenizer.decode(run.tokens[: first - opening])
    assert at in documents.tokenizer.decode(documents.read(0, 4 * documents.tokens))


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_line_asked_for_is_where_it_says(documents, depth):
    run = KV.example(documents, KV.draw(0, 1), length=300, depth=depth)
    *before, question = documents.tokenizer.decode(run.tokens).split("\n")
    lines = [line for line in before if re.search(r"[a-z]+\d{4}: \d{5}$", line)]
    lines[0] = lines[0][lines[0].index(re.search(r"[a-z]+\d{4}: ", lines[0])[0]) :]
    keys = [line.split(":")[0] for line in lines]
    assert len(lines) > 5 and len(set(keys)) == len(keys)
    place = round(depth * (len(lines) - 1))
    assert (
        lines[place].endswith(question[-10:])
        and documents.tokenizer.decode(answer(run)) == question[question.index(" ") :]
    )


def test_a_passage_comes_twice(documents):
    run = COPY.example(documents, COPY.draw(0, 1), length=300, depth=0.0)
    passage, mark = answer(run), documents.encode("\n")
    assert len(passage) >= 150 - 1 - len(mark)
    assert (run.tokens[-len(passage) :] == passage).all()
    first = run.tokens[: -len(passage) - len(mark)][-len(passage) :]
    assert (first == passage).all()
    shuffled = words(documents, COPY.draw(0, 9), 200)
    assert len(shuffled) == 200 and (shuffled != words(documents, COPY.draw(0, 8), 200)).any()


def test_every_key_is_asked_once_and_followed_by_its_value_alone(documents):
    run = MQAR.example(documents, MQAR.draw(0, 1), length=200, depth=0.0)
    pairs = 200 // 8
    given = dict(run.tokens[: 2 * pairs].reshape(-1, 2).tolist())
    assert len(given) == pairs
    asked = np.flatnonzero(run.labels != IGNORE_INDEX)
    assert sorted(run.tokens[asked].tolist()) == sorted(given)
    assert (asked >= 2 * pairs).all() and (asked % 2 == 0).all()
    for place, token in enumerate(run.tokens[:-1].tolist()):
        if token in given:
            assert run.tokens[place + 1] == given[token]
    special = {documents.tokenizer.eos_id, documents.tokenizer.pad_id}
    assert not special & set(run.tokens.tolist())


def test_small_gaps_are_likelier():
    """The first quarter of the room takes most questions under the power law, and a quarter
    without it."""
    shares = []
    for power in (0.1, 1.0):
        task = MultiQueryRecall(**GRID, pairs=4, vocabulary=64, power=power)
        task._ids = lambda text: (np.arange(32), np.arange(32, 64))
        places = [
            np.flatnonzero(
                task.question(None, task.draw(0, i), length=264, depth=0.0).labels != IGNORE_INDEX
            )
            for i in range(100)
        ]
        shares.append(float((np.concatenate(places) < 8 + 64).mean()))
    assert shares[0] > 0.6 and 0.15 < shares[1] < 0.35


@pytest.mark.parametrize("name", TASKS)
def test_too_few_tokens_are_told(documents, name):
    task = MultiQueryRecall(**GRID, pairs=9, vocabulary=64, power=0.1)
    task = task if name == "mqar" else TASKS[name]
    with pytest.raises(
        ConfigError, match=rf"tasks.{name}.lengths: 3 tokens hold no .* allowed: "
    ) as e:
        task.example(documents, task.draw(0, 0), length=3, depth=1.0)
    needed = int(re.search(r"allowed: (\d+)", str(e.value))[1])
    run = task.example(documents, task.draw(0, 0), length=needed, depth=1.0)
    assert len(run.tokens) == needed


def test_text_goes_round_without_ends_of_documents(documents):
    twice = documents.read(5, 2 * documents.tokens)
    assert (twice[: documents.tokens] == twice[documents.tokens :]).all()
    assert (documents.read(5 + documents.tokens, 40) == twice[:40]).all()
    assert documents.tokenizer.eos_id not in twice
    whole = documents.tokenizer.decode(documents.read(0, documents.tokens))
    assert "watches quietly. " in whole and whole.count("quick") > 5
    assert "quick" in documents.words and len(set(documents.words)) == len(documents.words)


def test_without_held_out_documents_there_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.eval_fraction: no document is held out"):
        text(tmp_path, eval_fraction=0.0)


def rows_of(tmp_path, lengths, **changes) -> TaskRows:
    task = MultiQueryRecall(
        lengths=lengths, samples=1, seed=0, pairs=4, vocabulary=64, power=0.1, **changes
    )
    documents = text(tmp_path)
    return TaskRows(task, documents, seq_len=100, seed=1, identity={"a": 1})


def test_rows_take_examples_until_none_fits(tmp_path):
    rows = rows_of(tmp_path, [24, 40, 500])
    read = [rows.read(epoch, row) for epoch in range(2) for row in range(20)]
    for row in read:
        lengths = [len(run.tokens) for run in row]
        assert set(lengths) <= {24, 40} and 100 - 24 < sum(lengths) <= 100
    assert len({row[0].tokens.tobytes() for row in read}) == 40
    assert rows.read(1, 7)[0].tokens.tobytes() == read[27][0].tokens.tobytes()
    assert rows.hash(0) != rows.hash(1) and rows.count(0) > 10**6
    with pytest.raises(
        ConfigError, match=r"tasks.mqar.lengths=\[500\]: none fits into rows of data"
    ):
        rows_of(tmp_path, [500])


def test_training_and_evaluation_see_different_examples(tmp_path):
    rows = rows_of(tmp_path, [100])
    seen = {rows.read(0, row)[0].tokens.tobytes() for row in range(50)}
    task, documents = rows._task, rows._text
    asked = [task.example(documents, task.draw(0, i), length=100, depth=0.0) for i in range(50)]
    assert not seen & {run.tokens.tobytes() for run in asked}


def test_training_rows_of_a_task_come_through_the_stream(tmp_path):
    """Labels on answers only; the store's other split is for evaluation."""
    made = data(tmp_path, task="mqar", options=OPTIONS)
    batch = read(made, (0, 0), (0, 1))
    assert batch.tokens.shape == (2, 128) and batch.valid_labels == 2 * 2 * 4
    assert packed(made).count(0) > 10**6
    assert made.identity()["tasks.mqar.pairs"] == "4"
    made.reader = pickle.loads(pickle.dumps(made.reader))  # as a loading process gets it
    assert read(made, (0, 0), (0, 1)).tokens.equal(batch.tokens)


OPTIONS = {
    "_target_": "trainer.evals.mqar.MultiQueryRecall",
    "lengths": [64],
    "samples": 1,
    "seed": 0,
    "pairs": 4,
    "vocabulary": 64,
    "power": 0.1,
}
