"""Tiny real models and data sets, made on the spot: no network, seconds to train."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import yaml

WORDS = {
    "weather": ["rain", "sun", "cloud", "storm", "wind", "snow"],
    "food": ["bread", "soup", "rice", "apple", "cheese", "salad"],
    "sport": ["goal", "match", "team", "score", "race", "ball"],
}
FILLER = ["the", "a", "today", "we", "saw", "some", "very", "good", "and", "more"]


def make_model(directory: Path) -> Path:
    """Save a two-layer BERT of about 20 thousand random parameters with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(w for group in WORDS.values() for w in group)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    set_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).save_pretrained(directory)
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
