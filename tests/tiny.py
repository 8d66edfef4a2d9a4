"""Tiny real models and data sets, made on the spot: no network, seconds to train."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import yaml

WORDS = {
    "weather": ["rain", "sun", "cloud", "storm", "wind", "snow"],
    "food": ["bread", "soup", "rice", "apple", "cheese", "salad"],
    "sport": ["goal", "match", "team", "score", "race", "ball"],
}
FILLER = ["the", "a", "today", "we", "saw", "some", "very", "good", "and", "more"]


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(word for group in WORDS.values() for word in group)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}


def save_tokenizer(directory: Path, **special: str) -> None:
    """Save a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        around = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **special).save_pretrained(directory)


def make_model(directory: Path) -> Path:
    """Save a two-layer BERT of about 20 thousand random parameters with a word-level tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    save_tokenizer(directory, cls_token="[CLS]", sep_token="[SEP]")
    set_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(VOCABULARY), **SIZES)).save_pretrained(directory)
    return directory


def make_language_model(directory: Path) -> Path:
    """Save a two-layer Llama as small, with the same words."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    save_tokenizer(directory, eos_token="[SEP]")
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), **SIZES, pad_token_id=0, eos_token_id=3)).save_pretrained(directory)
    return directory


def make_task(directory: Path, *, name: str = "subjects", num_rows: int = 24) -> Path:
    """Write a multiple-choice task of lm-evaluation-harness with its rows: which word belongs to the ones before."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    with (directory / "rows.jsonl").open("w") as file:
        for i in range(num_rows):
            label = i % len(WORDS)
            question = " ".join([*rng.choices(list(WORDS.values())[label], k=3), "and"])
            choices = [rng.choice(words) for words in WORDS.values()]
            file.write(json.dumps({"question": question, "choices": choices, "label": label}) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return directory


def make_rows(path: Path, *, num_rows: int = 240, seed: int = 0) -> Path:
    """Write `text,label` rows of unequal length that a model can learn."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(num_rows):
            label = list(WORDS)[i % len(WORDS)]
            words = rng.choices(FILLER, k=rng.randint(2, 12)) + rng.choices(WORDS[label], k=2)
            rng.shuffle(words)
            writer.writerow([" ".join(words) + f" {i}", label])
    return path


def make_spec(directory: Path, **changes: object) -> Path:
    """Write a spec for the tiny model and data; `changes` replace whole sections."""
    directory.mkdir(parents=True, exist_ok=True)
    spec: dict[str, object] = {
        "name": "tiny",
        "model": {"name": str(make_model(directory / "model")), "task": "sequence-classification", "max_length": 32},
        "data": {
            "train": str(make_rows(directory / "train.csv")),
            "test": str(make_rows(directory / "test.csv", num_rows=30, seed=1)),
        },
        "space": {
            "adapter": "lora",
            "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
            "global_batch_size": {"choice": [8, 16]},
            "dataset_fraction": {"uniform": [0.2, 1.0]},
            "lora_rank": {"choice": [2, 4]},
            "world_size": {"choice": [1, 2]},
            "strategy": {"choice": ["ddp", "fsdp"]},
        },
        "budget": {"trials": 4},
        "directory": str(directory / "runs"),
    }
    spec.update(changes)
    path = directory / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path
