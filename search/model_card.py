"""The model card of an exported trial: its scores, how to load it, what it was trained with, and where it is from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.confidence import confirmed, score_text
from search.formatting import number_text, short_text
from search.record import TrialRecord
from search.results import Results
from spaces.config import Recipe
from spaces.inputs import DataSpec
from spaces.metrics import in_order, metric_of
from trainables.hub import EMBEDDED_MODEL, EMBEDDED_ORIGIN, class_for, model_config

PIPELINES = {"sequence-classification": "text-classification", "causal-lm": "text-generation"}
# How transformers holds the base as `trainables.quantize` does; where there are modules that it must leave as they are, with these.
QUANTIZATIONS = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="{dtype}"{skipped})',
    "int8": "BitsAndBytesConfig(load_in_8bit=True{skipped})",
    "float8": 'TorchAoConfig(Float8WeightOnlyConfig(){skipped}), dtype="{dtype}"',
}
SKIPPED = {"nf4": "llm_int8_skip_modules", "int8": "llm_int8_skip_modules", "float8": "modules_to_not_convert"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
BEHIND_PREFIX = """
# Not with model.generate: PEFT 0.21 loses a prefix there with newer transformers.
tokens = tokenizer("TEXT", return_tensors="pt")
mask = torch.nn.functional.pad(tokens["attention_mask"], ({tokens}, 0), value=1)
out = base.generate(tokens["input_ids"], attention_mask=mask, past_key_values=model.get_prompt(1), max_new_tokens=50)
print(tokenizer.decode(out[0], skip_special_tokens=True))"""


def model_card(
    results: Results, record: TrialRecord, *, is_merged: bool, scores: Mapping[str, float], unquantized: Sequence[str] = ()
) -> str:
    """Return the `README.md` of an exported trial.

    Args:
        results: the search.
        record: the trial.
        is_merged: whether its adapter is in the weights.
        scores: of these weights on the evaluation rows, where they are not those that the trial was scored with.
        unquantized: modules that stay as they are beside an adapter on a quantised base, and that transformers would not know.
    """
    recipe = record.trial_config.recipe
    is_adapter = recipe.adapter != "none" and not is_merged
    parts = [
        _head(results, record, is_adapter=is_adapter),
        f"# {results.name}, trial {record.number}",
        _origin_text(results, record, is_merged=is_merged),
        "## Scores",
        _scores(results, record, scores),
        "## Use",
        _usage(results, recipe, unquantized, is_adapter=is_adapter),
        *_prompting(results),
        "## Training",
        _table(("knob", "value"), ((f"`{knob}`", short_text(value)) for knob, value in record.trial_config.flat().items())),
        "## Provenance",
        _provenance(results, record),
    ]
    return "\n\n".join(parts) + "\n"


def _head(results: Results, record: TrialRecord, *, is_adapter: bool) -> str:
    """Return the metadata that the hub reads: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import EvalResult, ModelCardData

    task, data, adapter = PIPELINES[results.spec.model.task], results.spec.data, record.trial_config.recipe.adapter
    measured = [(name, value, "test") for name, value in record.test.items()]
    measured += [(name, value, "evaluation") for name, value in record.values.items() if metric_of(name).section == "eval"]
    hub = [
        s.train.removeprefix("hf:").partition("@")[0].partition(":")[0] for s in data.sources.values() if s.train.startswith("hf:")
    ]
    metadata = ModelCardData(
        base_model=base_name(results.spec.model.name),
        datasets=hub or None,
        # No library of the hub's loads a bottleneck.
        library_name=None if is_adapter and adapter == "bottleneck" else "peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=["paretune", adapter] if is_adapter else ["paretune"],
        model_name=f"{results.name}, trial {record.number}",
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=_data_name(data, split),
                dataset_name=_data_name(data, split).rpartition("/")[2],
                dataset_split=split,
                metric_type=name,
                metric_value=round(value, 6),
            )
            for name, value, split in measured
        ],
    )
    return f"---\n{metadata.to_yaml()}\n---"


def _data_name(data: DataSpec, split: str) -> str:
    """Return where rows are from: a name on the hub, or a file's, whose place here is nobody's business."""
    files = [getattr(source, split, None) or source.train for source in data.sources.values()]
    return ", ".join(dict.fromkeys(file.removeprefix("hf:") if file.startswith("hf:") else Path(file).name for file in files))


def base_name(name: str) -> str | None:
    """Return the model's name on the hub; a local directory has none."""
    if name == EMBEDDED_MODEL:
        return EMBEDDED_ORIGIN
    return None if Path(name).is_dir() else name


def _origin_text(results: Results, record: TrialRecord, *, is_merged: bool) -> str:
    model, recipe = results.spec.model, record.trial_config.recipe
    size = f"{recipe.adapter_rank} tokens" if recipe.adapter == "prefix" else f"rank {recipe.adapter_rank}"
    rank = "" if recipe.adapter_rank is None else f" of {size}"
    how = "every weight trained" if recipe.adapter == "none" else f"{recipe.adapter}{rank}"
    merged = ", merged into the weights" if is_merged else ""
    rows = f", {record.details['distinct_rows']:,} training rows" if "distinct_rows" in record.details else ""
    return f"`{base_name(model.name) or model.name}` on `{results.spec.data.name}`{rows}: {how}{merged}."


def _scores(results: Results, record: TrialRecord, merged: Mapping[str, float]) -> str:
    columns: list[tuple[str, Mapping[str, float]]] = [("evaluation rows", record.values)]
    if merged:
        columns.append(("evaluation rows, these weights", merged))
    if record.test:
        columns.append(("test rows", record.test))
    if results.state.reference:
        columns.append(("untrained, evaluation rows", results.state.reference))
    names = [name for name in in_order(name for _, column in columns for name in column) if metric_of(name).section == "eval"]
    sure = {name: c.text for name in names if (c := confirmed(record, name)) is not None}
    headings = ("metric", *(heading for heading, _ in columns), *(["further seeds"] if sure else []))
    lines = [
        _table(
            headings,
            (
                [
                    name,
                    score_text(record, name),
                    *(number_text(name, column.get(name)) for _, column in columns[1:]),
                    *([sure.get(name, "-")] if sure else []),
                ]
                for name in names
            ),
        )
    ]
    if merged:
        lines.append(
            "These weights are not quite those that were scored in training: rounded to bf16, or of a base that was quantised then."
        )
    if not record.confirmations:
        lines.append("One seed; the search chose this trial by the evaluation rows, so their scores are optimistic.")
    return "\n\n".join(lines)


def _usage(results: Results, recipe: Recipe, unquantized: Sequence[str], *, is_adapter: bool) -> str:
    model = results.spec.model
    name, task = class_for(model_config(model.name, model.revision), model.task), PIPELINES[model.task]
    if not is_adapter and name == "AutoModelForImageTextToText":  # no pipeline of texts takes it
        lines = [f"from transformers import {name}, AutoTokenizer", "", f'model = {name}.from_pretrained("THIS_DIRECTORY")']
        return "\n".join(["```python", *lines, 'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")', "```"])
    if not is_adapter:
        return f'```python\nfrom transformers import pipeline\n\nmodel = pipeline("{task}", model="THIS_DIRECTORY")\n```'
    options, imports, ending = "", f"AutoConfig, AutoTokenizer, {name}", []
    if model.task == "causal-lm":
        imports += ", GenerationConfig"
        ending = ['base.generation_config = GenerationConfig.from_pretrained("THIS_DIRECTORY")  # where answers end']
    if recipe.quantization != "none":
        skipped = f", {SKIPPED[recipe.quantization]}={list(unquantized)!r}" if unquantized else ""
        how = QUANTIZATIONS[recipe.quantization].format(dtype=DTYPES[recipe.precision], skipped=skipped)
        options = f", quantization_config={how}"
        imports += f", {how.partition('(')[0]}"
    revision = f', revision="{model.revision}"' if model.revision else ""
    if model.task == "sequence-classification":
        options += ", ignore_mismatched_sizes=True"  # the base may have a head of another size
    first, last = "from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")'
    if recipe.adapter == "bottleneck":
        first = 'import sys\n\nsys.path.insert(0, "THIS_DIRECTORY")\nfrom bottleneck import load'
        last = 'model = load(base, "THIS_DIRECTORY")'
    after = []
    if recipe.adapter == "prefix":
        first, after = f"import torch\n{first}", [BEHIND_PREFIX.format(tokens=recipe.adapter_rank)]
    if recipe.quantization == "float8":
        first = f"{first}\nfrom torchao.quantization import Float8WeightOnlyConfig"
    return "\n".join(
        [
            "```python",
            first,
            f"from transformers import {imports}",
            "",
            'config = AutoConfig.from_pretrained("THIS_DIRECTORY")',
            f'base = {name}.from_pretrained("{base_name(model.name) or model.name}"{revision}, config=config{options})',
            *ending,
            last,
            'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
            *after,
            "```",
        ]
    )


def _prompting(results: Results) -> list[str]:
    """Return how a prompt is to be given, which the model has learned one way alone."""
    form = str((results.state.started or {}).get("data", {}).get("format", ""))
    lines = {
        "prompt and completion": 'prompts that end with one line break more, and completions behind it: give it `prompt + "\\n"`.',
        "messages": "chats in the tokenizer's template: give it `tokenizer.apply_chat_template(messages, ...)`.",
    }
    told = []
    for kind, line in lines.items():
        if domains := re.findall(rf"(?:^|; )([\w.-]+): {kind} \(", form):
            told.append(f"Of {', '.join(domains)} it was trained on {line}")
        elif form.startswith(f"{kind} ("):
            told.append(f"It was trained on {line}")
    return told


def _provenance(results: Results, record: TrialRecord) -> str:
    started: Mapping[str, Any] = results.state.started or {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(started.get("versions", {}).items()))
    rows = [
        ("search", f"`{results.name}`, trial {record.number}"),
        ("data", f"`{results.spec.data.name}`, fingerprint `{started.get('data_fingerprint')}`"),
        ("config", f"`{record.trial_config.key()}`"),
        ("machine", started.get("machine")),
        ("versions", versions),
        ("git commit of the working directory", started.get("git_commit")),
    ]
    table = _table(("what", "value"), ([what, str(value)] for what, value in rows if value))
    return f"{table}\n\nTo train it again:\n\n```bash\n{results.command_of(record)}\n```"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
