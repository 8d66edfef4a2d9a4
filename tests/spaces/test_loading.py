from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces.loading import SpecError, dump_spec, json_schema, load_spec, parse_spec
from spaces.spec import SearchSpec

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))

GOOD = """\
model:
  name: m
  task: causal-lm
data:
  train: t.txt
space:
  learning_rate: {log_uniform: [1e-4, 1e-2]}
objectives:
  - {metric: eval_loss}
  - metric: train_seconds
    reference: 60
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_(text: str | bytes) -> Path:
        path = Path("spec.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_


@pytest.fixture
def errors(write):
    """Load a text and return the error lines."""

    def errors_(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load_spec(write(text), overrides)
        assert str(caught.value) == "\n".join(caught.value.lines)
        return caught.value.lines

    return errors_


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_load_and_load_back(path):
    spec = load_spec(path).spec
    assert spec.space.names_searched()
    assert parse_spec(dump_spec(spec), "dumped") == spec


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run_offline_with_the_overrides_that_their_comment_names(path):
    command = re.findall(r"--set (\S+)", path.read_text())
    loaded = load_spec(path, command)
    for override in command:
        key, _, value = override.partition("=")
        assert loaded.origins[key] == "--set"
        section, name = key.split(".")
        assert getattr(getattr(loaded.spec, section), name) == value


def test_there_are_examples():
    assert {p.stem for p in EXAMPLES} >= {"demo", "banking77", "shakespeare", "gsm8k"}


def test_the_demo_needs_no_network():
    spec = load_spec(EXAMPLES[0].with_name("demo.yaml")).spec
    assert spec.model.name.startswith("embedded:")
    assert spec.data.train.startswith("embedded:")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_satisfy_the_published_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    from spaces.yaml_text import parse

    data = parse(path.read_text()).data
    validator.validate(data)
    data["space"]["dataset_fraction"] = 1.5
    assert [list(e.path) for e in validator.iter_errors(data)] == [["space", "dataset_fraction"]]


def test_what_budget_gave_has_it_as_its_origin_and_takes_the_place_of_what_was_set(write):
    path = write(GOOD)
    loaded = load_spec(path, ["budget={minutes: 7, dollars: 5, patience: 9}"], ["30m", "50trials"])
    budget = loaded.spec.budget
    assert (budget.minutes, budget.trials, budget.dollars, budget.patience) == (30, 50, None, 9)
    assert (loaded.origins["budget.trials"], loaded.origins["budget.patience"]) == ("--budget", "--set")
    for sets, amounts, begin in [
        ([], ["0m"], "--budget: budget.minutes: out of range"),
        (["budget.minutes=0"], [], "--set: budget.minutes: out of range"),
        ([], ["5usd"], "--budget: budget: dollars without a price"),
        (["budget.patience=5"], ["5usd"], "--set and --budget: budget: dollars without a price"),
        (["budget.dollars=5"], [], "--set: budget: dollars without a price"),
    ]:
        with pytest.raises(SpecError) as raised:
            load_spec(path, sets, amounts)
        (line,) = raised.value.lines
        assert line.startswith(begin)
    with pytest.raises(SpecError) as raised:
        load_spec(path, ["budget.patience=0"], ["30"])
    assert [line[:30] for line in raised.value.lines] == ["--set: budget.patience: out of", "--budget 30: not a budget; all"]


def test_the_origin_of_every_value(write):
    loaded = load_spec(write(GOOD), ["space.learning_rate=0.001", "budget.trials=3", "objectives[1].reference=5"])
    assert loaded.path == Path("spec.yaml")
    assert loaded.origins == {
        "model.name": "spec.yaml:2",
        "model.task": "spec.yaml:3",
        "data.train": "spec.yaml:5",
        "space.learning_rate": "--set",
        "budget.trials": "--set",
        "objectives": "spec.yaml:8",
    }


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("model.name: no such directory", "spec.yaml:2: model.name: no such directory"),
        ("t.txt: data.text: no column 'x'; did you mean: y", "spec.yaml: t.txt: data.text: no column 'x'; did you mean: y"),
        ("t.txt: line 3: not UTF-8", "spec.yaml:5: data.train: t.txt: line 3: not UTF-8"),
        ("space.learning_rate: too large", "--set: space.learning_rate: too large"),
        ("config.json: no key", "spec.yaml: config.json: no key"),
    ],
)
def test_a_message_gets_the_place_of_the_key_or_of_the_data_file_that_it_is_about(write, message, place):
    assert load_spec(write(GOOD), ["space.learning_rate=0.001"]).locate(message) == place


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("space.learning_rate=1e-5", lambda s: s.space.learning_rate.root == 1e-5),
        ("space.learning_rate={uniform: [1e-5, 1e-3]}", lambda s: s.space.learning_rate.bounds == (1e-5, 1e-3)),
        ("space.learning_rate.log_uniform=[1e-5, 1e-3]", lambda s: s.space.learning_rate.bounds == (1e-5, 1e-3)),
        ("space.learning_rate.log_uniform[0]=1e-6", lambda s: s.space.learning_rate.bounds == (1e-6, 1e-2)),
        ("budget.minutes=2", lambda s: s.budget.minutes == 2.0),
        ("budget.minutes=", lambda s: s.budget.minutes is None),
        ("objectives[1].reference=5", lambda s: s.objectives[1].reference == 5.0),
        ("objectives.1.reference=5", lambda s: s.objectives[1].reference == 5.0),
        ("objectives=null", lambda s: s.objectives is None),
        ("name=no", lambda s: s.name == "no"),
        ("data.answer_pattern='#### (.*)'", lambda s: s.data.answer_pattern == "#### (.*)"),
        ("tracking.uri=http://h:5000/a=b", lambda s: s.tracking.uri == "http://h:5000/a=b"),
    ],
)
def test_overrides(write, override, read):
    assert read(load_spec(write(GOOD), [override]).spec)


def test_the_last_override_wins(write):
    assert load_spec(write(GOOD), ["budget.trials=1", "budget={trials: 2}", "budget.trials=3"]).spec.budget.trials == 3


# One edit of the good file, and the one line that it must give.
LINES = {
    "unknown key": (
        "space:\n",
        "space:\n  lora_rankk: 4\n",
        r"spec.yaml:7: space.lora_rankk: unknown key, got 4; allowed: adapter, .*; did you mean 'lora_rank'\?",
    ),
    "unknown section": (
        "model:\n",
        "trainer: {lora: {rankk: 3}}\nmodel:\n",
        r'spec.yaml:1: trainer: unknown key, got {"lora": {"rankk": 3}}; allowed: name, model, .*',
    ),
    "key of another section": (
        "data:\n",
        "data:\n  lora_rank: 4\n",
        r"spec.yaml:5: data.lora_rank: unknown key, got 4; allowed: train, .*; did you mean 'space.lora_rank'\?",
    ),
    "reversed": (
        "[1e-4, 1e-2]",
        "[1e-2, 1e-4]",
        r"spec.yaml:7: space.learning_rate.log_uniform: the range is reversed, got \[0.01, 0.0001\]; "
        r"allowed: \[low, high\] with low < high; did you mean '\[0.0001, 0.01\]'\?",
    ),
    "misspelt range": (
        "log_uniform",
        "loguniform",
        r"spec.yaml:7: space.learning_rate.loguniform: unknown key, got \[0.0001, 0.01\]; "
        r"allowed: choice, uniform, log_uniform, by_adapter; did you mean 'log_uniform'\?",
    ),
    "range of names": (
        "space:\n",
        "space:\n  strategy: {uniform: [ddp, fsdp]}\n",
        r'spec.yaml:7: space.strategy.uniform: not a form of this knob, got \["ddp", "fsdp"\]; '
        r"allowed: a value, {choice: \[...\]}, {profile: \[...\]}",
    ),
    "two forms": (
        "{log_uniform: [1e-4, 1e-2]}",
        "{log_uniform: [1e-4, 1e-2], choice: [1]}",
        r"spec.yaml:7: space.learning_rate: needs exactly one form, got {.*}; allowed: a value, {choice: .*",
    ),
    "bare list": (
        "space:\n",
        "space:\n  world_size: [1, 2]\n",
        r"spec.yaml:7: space.world_size: a list is no form of a knob, got \[1, 2\]; "
        r"allowed: .*; did you mean '{choice: \[1, 2\]}'\?",
    ),
    "fraction": (
        "space:\n",
        "space:\n  dataset_fraction: 1.5\n",
        r"spec.yaml:7: space.dataset_fraction: out of range, got 1.5; allowed: a number above 0 and at most 1",
    ),
    "fraction in a list": (
        "space:\n",
        "space:\n  dataset_fraction:\n    choice:\n      - 0.5\n      - 0\n",
        r"spec.yaml:10: space.dataset_fraction.choice\[1\]: out of range, got 0; allowed: a number above 0 .*",
    ),
    "text for a number": (
        "space:\n",
        "space:\n  world_size: two\n",
        r'spec.yaml:7: space.world_size: not an integer, got "two"; allowed: an integer at least 1 and at most 4096',
    ),
    "unknown by adapter": (
        "{log_uniform: [1e-4, 1e-2]}",
        "{by_adapter: {lora: 1e-3, nome: 1e-4}}",
        r"spec.yaml:7: space.learning_rate.by_adapter.nome: unknown key, got 0.0001; "
        r"allowed: none, lora, rslora, dora, vera, ia3, oft, bottleneck, prefix; did you mean 'none'\?",
    ),
    "wrong inside by adapter": (
        "{log_uniform: [1e-4, 1e-2]}",
        "\n    by_adapter:\n      lora: {uniform: [1e-3, -1]}",
        r"spec.yaml:9: space.learning_rate.by_adapter.lora.uniform\[1\]: out of range, got -1; "
        r"allowed: a number above 0 and at most 10",
    ),
    "no range for an adapter": (
        "{log_uniform: [1e-4, 1e-2]}",
        "{by_adapter: {none: 1e-4}}",
        r"spec.yaml:7: space.learning_rate: by_adapter has nothing for lora, got .*; "
        r"allowed: an entry for each adapter of the space",
    ),
    "metric": (
        "metric: train_seconds",
        "metric: train_secs",
        r'spec.yaml:10: objectives\[1\].metric: not a metric, got "train_secs"; allowed: eval_loss, .*; '
        r"did you mean 'train_seconds'\?",
    ),
    "metric of the other task": (
        "{metric: eval_loss}",
        "{metric: macro_f1}",
        r"spec.yaml:8: objectives: macro_f1 is not reported for causal-lm, got .*; "
        r"allowed: macro_f1 only with sequence-classification",
    ),
    "direction": (
        "reference: 60",
        "direction: min",
        r'spec.yaml:11: objectives\[1\].direction: not a known value, got "min"; allowed: minimize, maximize; '
        r"did you mean 'minimize'\?",
    ),
    "task": (
        "causal-lm",
        "causal_lm",
        r'spec.yaml:3: model.task: not a known value, got "causal_lm"; allowed: sequence-classification, causal-lm; '
        r"did you mean 'causal-lm'\?",
    ),
    "missing": (
        "  task: causal-lm\n",
        "",
        r"spec.yaml:1: model.task: required, but missing; allowed: sequence-classification, causal-lm",
    ),
    "no rows": (
        "  train: t.txt",
        "  holdout: 0.2",
        r"spec.yaml:4: data.train: required, but missing; allowed: a csv, tsv, .*; or domains: {NAME: {train: FILE}}",
    ),
    "rows beside domains": (
        "  train: t.txt",
        "  train: t.txt\n  domains: {law: {train: law.csv}}",
        r"spec.yaml:4: data: train stands beside domains, got .*; allowed: domains, each with its own train",
    ),
    "key of a domain": (
        "  train: t.txt",
        "  domains:\n    law: {train: law.csv, wieght: 2}",
        r"spec.yaml:6: data.domains.law.wieght: unknown key, got 2; allowed: train, evaluation, test, weight, text, label, prompt, "
        r"completion, messages; did you mean 'weight'\?",
    ),
    "name of a domain": (
        "  train: t.txt",
        "  domains:\n    a/b: {train: law.csv}",
        r"spec.yaml:6: data.domains.a/b: not a safe name for a directory, got .*; allowed: 1 to 64 letters, .*",
    ),
    "weight of one domain": (
        "  train: t.txt",
        "  domains:\n    law: {train: law.csv, weight: 2}\n    art: {train: art.csv}",
        r"spec.yaml:5: data.domains: 'art' has no weight, and others have, got .*; allowed: a weight for every domain, or for none",
    ),
    "accuracy of no domain": (
        "{metric: eval_loss}",
        "{metric: accuracy.law}",
        r"spec.yaml:8: objectives: accuracy.law is of no domain of the data, got .*; allowed: with data.domains",
    ),
    "import path": (
        "  train: t.txt",
        "  train: t.txt\n  metric: my_scores.f1",
        r'spec.yaml:6: data.metric: not an import path, got "my_scores.f1"; allowed: module:function, as my_scores:weighted_f1',
    ),
    "number for a text": (
        "name: m",
        "name: 7",
        r"spec.yaml:2: model.name: not a text, got 7; allowed: a text; in quotes .*",
    ),
    "section is a value": (
        "data:\n  train: t.txt",
        "data: t.txt",
        r'spec.yaml:4: data: not a section, got "t.txt"; allowed: the keys train, evaluation, .*',
    ),
    "objectives no list": (
        "  - {metric: eval_loss}\n  - metric: train_seconds\n    reference: 60",
        "  metric: accuracy",
        r'spec.yaml:8: objectives: not a list, got {"metric": "accuracy"}; allowed: a list',
    ),
    "one objective": (
        "  - {metric: eval_loss}\n",
        "",
        r"spec.yaml:8: objectives: 1 objectives, got .*; allowed: 2 or 3 objectives",
    ),
    "twice": (
        "  task: causal-lm\n",
        "  task: causal-lm\n  name: other\n",
        r"spec.yaml:4: model.name: the key stands twice, first in line 2",
    ),
    "tag": ("name: m", "name: !!python/name:os.system", r"spec.yaml:2: model.name: the tag \S+ is not allowed"),
    "alias": ("name: m", "name: &m m\n  revision: *m", r"spec.yaml:3: not valid YAML: aliases .*"),
    "syntax": ("  task: causal-lm", "\ttask: causal-lm", r"spec.yaml:3: not valid YAML: .*"),
    "pattern": (
        "  train: t.txt",
        "  train: t.txt\n  answer_pattern: '({x'",
        r'spec.yaml:6: data.answer_pattern: not a regular expression \(.*\), got "\({x"; allowed: a regular .*',
    ),
    "no group": (
        "  train: t.txt",
        "  train: t.txt\n  answer_pattern: '[0-9]+'",
        r"spec.yaml:6: data.answer_pattern: the expression has no group, got .*; allowed: .*; did you mean '\(.*\)'\?",
    ),
    "embedded": (
        "name: m",
        "name: embedded:minilm",
        r'spec.yaml:2: model.name: not an embedded one, got "embedded:minilm"; allowed: embedded:all-MiniLM-L6-v2.*',
    ),
    "infinite": (
        "{log_uniform: [1e-4, 1e-2]}",
        "1e999",
        r"spec.yaml:7: space.learning_rate: not finite, got Infinity; allowed: .*",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_one_mistake_gives_one_clear_line(errors, case):
    before, after, line = LINES[case]
    assert before in GOOD
    found = [e for e in errors(GOOD.replace(before, after, 1)) if "tag" not in case or "the tag" in e]
    assert len(found) == 1, found
    assert re.fullmatch(line, found[0]), found[0]
    assert "kind:" not in found[0]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("space.lora_rankk=4", r"--set: space.lora_rankk: unknown key, got 4; allowed: .*; did you mean 'lora_rank'\?"),
        ("trials=4", r"--set: trials: unknown key, got 4; allowed: .*; did you mean 'budget.trials'\?"),
        ("space.dataset_fraction=1.5", r"--set: space.dataset_fraction: out of range, got 1.5; allowed: .*"),
        ("space={seed: -1}", r"--set: space.seed: out of range, got -1; allowed: .*"),
        ("objectives[0].metric=loss", r'--set: objectives\[0\].metric: not a metric, got "loss"; allowed: .*'),
        ("objectives[2].metric=mfu", r"--set objectives\[2\].metric=mfu: objectives is a list; allowed: .* 0 to 1"),
        ("objectives[2]=mfu", r"--set objectives\[2\]=mfu: objectives is a list; allowed: .* 0 to 1"),
        ("objectives.first=mfu", r"--set objectives.first=mfu: objectives is a list; allowed: .* 0 to 1"),
        ("budget.trials", r"--set budget.trials: not of the form KEY=VALUE; .*"),
        ("=3", r"--set =3: not of the form KEY=VALUE; .*"),
        ("name=[a", r"--set name=\[a: not valid YAML: .*"),
        ("name=!!python/name:os.x", r"--set .*: the tag .* is not allowed"),
        ("data.answer_pattern=#### (.*)", r"--set .*: YAML reads the value as a comment; put it in quotes"),
    ],
)
def test_a_wrong_override_gives_one_clear_line(errors, override, line):
    found = errors(GOOD, override)
    assert len(found) == 1, found
    assert re.fullmatch(line, found[0]), found[0]


def test_all_errors_at_once_in_the_order_of_the_file(errors):
    text = GOOD.replace("  name: m", "  nam: m").replace("[1e-4, 1e-2]", "[1, 0.1]") + "budget: {trials: 0}\n"
    found = errors(text, "space.seed=x", "nonsense")
    assert [line.split(": ")[:2] for line in found] == [
        ["spec.yaml:1", "model.name"],
        ["spec.yaml:2", "model.nam"],
        ["spec.yaml:7", "space.learning_rate.log_uniform"],
        ["spec.yaml:12", "budget.trials"],
        ["--set", "space.seed"],
        ["--set nonsense", "not of the form KEY=VALUE; allowed"],
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "null"])
def test_an_empty_file_lacks_its_sections(errors, text):
    assert [line.split(": ")[:3] for line in errors(text)] == [
        ["spec.yaml:1", "model", "required, but missing; allowed"],
        ["spec.yaml:1", "data", "required, but missing; allowed"],
    ]


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "3\n"])
def test_a_file_without_keys(errors, text):
    (line,) = errors(text)
    assert line.startswith("spec.yaml:1: the file must hold keys and values; allowed: name, model, ")


def test_files_that_cannot_be_read(errors, tmp_path):
    assert errors(b"model:\n  name: \xff\n") == ["spec.yaml:2: not valid UTF-8, got byte 0xff; save the file as UTF-8"]
    assert errors(b"#" * 1_000_001) == ["spec.yaml: too large; allowed: 1000000 bytes"]
    for path, reason in ((tmp_path / "absent.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SpecError, match=reason) as caught:
            load_spec(path)
        assert len(caught.value.lines) == 1


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write):
    assert load_spec(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())).spec.model.name == "m"


def test_parse_spec_names_its_source():
    with pytest.raises(SpecError) as caught:
        parse_spec("model: {name: m}\ndata: {train: t}\n", "mlflow: x/spec.yaml")
    assert caught.value.lines[0].startswith("mlflow: x/spec.yaml:1: model.task: required")


def test_a_long_value_is_cut(errors):
    (line,) = errors(GOOD.replace("name: m", f"name: m\n  extra: {'x' * 1000}"))
    assert "xxx...; allowed" in line
    assert len(line) < 300


KNOBS = st.fixed_dictionaries(
    {},
    optional={
        "adapter": st.sampled_from(["lora", "none", {"choice": ["none", "lora"]}]),
        "learning_rate": st.floats(1e-7, 10) | st.just({"by_adapter": {"none": 1e-5, "lora": {"uniform": [1e-5, 0.1]}}}),
        "epochs": st.floats(0.01, 100) | st.just({"int": [1, 9]}),
        "micro_batch_size": st.sampled_from(["auto", 4, {"choice": ["auto", 1]}]),
        "lora_target_modules": st.sampled_from(["q_proj,v_proj", {"choice": ["all-linear", "q_proj"]}]),
        "weight_decay": st.floats(0, 1),
    },
)


@settings(max_examples=50)
@given(
    space=KNOBS,
    name=st.none() | st.sampled_from(["no", "1e-4", "010", "true", "null", "2024-01-01", "x.y"]),
    column=st.none() | st.text(min_size=1).filter(lambda t: t.strip() and t.isprintable()),
)
def test_every_spec_is_dumped_so_that_it_loads_back_equal(space, name, column):
    data = {
        "name": name,
        "model": {"name": "m", "task": "causal-lm"},
        "data": {"train": "t", "text": column},
        "space": space,
    }
    spec = SearchSpec.model_validate(data)
    assert parse_spec(dump_spec(spec), "dumped") == spec


def test_the_reference_in_the_docs_is_that_of_the_code():
    from spaces.reference import reference

    page = Path(__file__).parents[2] / "docs/spec.md"
    assert page.read_text() == reference(), "run: python -m spaces.reference > docs/spec.md"


def test_the_schema_takes_profile_alone_where_the_file_does():
    jsonschema = pytest.importorskip("jsonschema")
    known = {"model": {"name": "m", "task": "causal-lm"}, "data": {"train": "t"}}
    validator = jsonschema.Draft202012Validator(json_schema())
    knobs = ("world_size", "strategy", "recomputation", "micro_batch_size")
    taken = [validator.is_valid({**known, "space": {knob: "profile"}}) for knob in knobs]
    assert taken == [True, True, True, False]
    assert validator.is_valid({**known, "space": dict.fromkeys(knobs[:3], "profile")})
