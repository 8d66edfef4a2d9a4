"""Which columns mean what, in the files that people bring."""

from __future__ import annotations

from typing import Any

import pytest

from spaces.inputs import DataSpec
from trainables.columns import Columns, detect, detect_like, field
from trainables.formats import DataError, read_rows

GIVEN = DataSpec(train="t.jsonl")


def found(*columns: str, task: str = "causal-lm", **given: str) -> Columns:
    return detect([dict.fromkeys(columns, "x")], DataSpec(train="t.jsonl", **given), "t.jsonl", task)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "prompt", "about", "completion"),
    [
        (("prompt", "completion"), "prompt", None, "completion"),
        (("instruction", "input", "output", "text"), "instruction", "input", "output"),  # Alpaca
        (("instruction", "context", "response", "category"), "instruction", "context", "response"),  # Dolly
        (("Question", "Answer"), "Question", None, "Answer"),
        (("type", "query", "original_question", "response"), "query", None, "response"),  # MetaMathQA
        (("id", "title", "context", "question", "answer"), "question", "context", "answer"),
        (("query", "context", "response"), "query", "context", "response"),
        (("input", "output"), "input", None, "output"),
        (("question", "output"), "question", None, "output"),
    ],
)
def test_prompts_with_completions_are_found_by_their_usual_names(
    columns: tuple[str, ...], prompt: str, about: str | None, completion: str
) -> None:
    expected = Columns(kind="prompt_completion", prompt=prompt, prompt_input=about, completion=completion)
    assert found(*columns) == expected


def test_of_columns_that_are_named_no_other_is_a_part_but_alpaca_s_input() -> None:
    assert found("instruction", "input", "output", prompt="instruction", completion="output").prompt_input == "input"
    assert found("question", "context", "answer", prompt="question", completion="answer").prompt_input is None
    assert found("instruction", "input", prompt="instruction", completion="input").prompt_input is None, "it is the completion"


@pytest.mark.parametrize("columns", [("question", "answers"), ("title", "url"), ("query", "passages")])
def test_a_language_model_is_not_taught_questions_whose_answers_are_not_found(columns: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: no known format among the columns .*; name them with data\.text"):
        found(*columns)
    assert found(*columns, text=columns[0]) == Columns(kind="text", text=columns[0])


def test_chats_and_texts_are_found_and_what_is_named_comes_first() -> None:
    assert found("conversations", "prompt", "completion") == Columns(kind="messages", messages="conversations")
    assert found("messages", "text", text="text") == Columns(kind="text", text="text")
    assert found("Content", "url") == Columns(kind="text", text="Content")
    with pytest.raises(DataError, match=r"data\.completion: needed, because the other"):
        found("prompt", "answer", prompt="prompt")


def test_other_rows_have_the_columns_of_the_training_rows_where_they_are_there() -> None:
    train = Columns(kind="classification", text="question", label="category")
    task = "sequence-classification"

    def columns(*there: str) -> Columns:
        return detect_like(train, [dict.fromkeys(there, "x")], GIVEN, "test.csv", task)

    assert columns("text", "question", "category") == train
    assert columns("text", "category") == Columns(kind="classification", text="text", label="category"), "one of two is not enough"
    assert columns("text", "label") == Columns(kind="classification", text="text", label="label")
    completed = Columns(kind="prompt_completion", prompt="prompt", completion="completion")
    with pytest.raises(DataError, match=r"test\.csv: no column 'prompt', which the training rows have; there are: text"):
        detect_like(completed, [{"text": "x"}], GIVEN, "test.csv", "causal-lm")
    other = detect_like(completed, [{"question": "x", "answer": "y"}], GIVEN, "test.csv", "causal-lm")
    assert (other.prompt, other.completion) == ("question", "answer")


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_field_without_a_text_is_an_error_of_its_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl: row 7: 'label' is empty"):
        field({"label": value}, "label", "t.jsonl", 7)
    assert field({"label": 0}, "label", "t.jsonl", 7) == "0"


def test_two_columns_of_one_name_are_refused_but_not_two_without_one(tmp_path: Any) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label,text\na,b,c\n")
    with pytest.raises(DataError, match=r"t\.csv: line 1: two columns are named 'text'"):
        read_rows(str(path), split="train")
    path.write_text("text,label,,\na,b,,\n")
    assert read_rows(str(path), split="train")[0]["text"] == "a"


def test_a_json_file_may_hold_lines(tmp_path: Any) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_rows(str(path), split="train") == [{"text": "a"}, {"text": "b"}]
    path.write_text('{"text": "a"}\n{"text": b}\n')
    with pytest.raises(DataError, match=r"t\.json: line 2: not valid JSON"):
        read_rows(str(path), split="train")
    path.write_text('[{"text": "a"},]')
    with pytest.raises(DataError, match=r"t\.json: not valid JSON"):
        read_rows(str(path), split="train")


def test_a_parquet_file_that_is_not_there_is_one_line(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"no\.parquet: cannot be read: .*No such file"):
        read_rows(str(tmp_path / "no.parquet"), split="train")
