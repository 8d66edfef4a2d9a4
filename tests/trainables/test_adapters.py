"""What trains beside LoRA."""

from __future__ import annotations

import pytest
from families import make
from peft.tuners.lora import LoraLayer

from spaces.config import Recipe
from trainables.adapters import add_lora
from trainables.report import TrialError


def recipe(*targets: str) -> Recipe:
    return Recipe(
        learning_rate=1e-3,
        global_batch_size=1,
        dataset_fraction=1,
        epochs=1,
        warmup_fraction=0,
        weight_decay=0,
        precision="fp32",
        seed=0,
        adapter="lora",
        adapter_rank=4,
        adapter_alpha=8,
        adapter_target_modules=targets,
    )


@pytest.mark.parametrize(
    ("family", "new", "whole"),
    [
        ("bert", ("classifier.weight", "classifier.bias"), {"classifier"}),
        ("bert", ("bert.pooler.dense.weight", "classifier.weight"), {"bert.pooler.dense", "classifier"}),
        ("distilbert", ("pre_classifier.weight", "classifier.weight"), {"pre_classifier", "classifier"}),
        ("distilbert", (), {"pre_classifier", "classifier"}),
        ("roberta", ("classifier.dense.weight", "classifier.out_proj.weight"), {"classifier.dense", "classifier.out_proj"}),
        ("llama", ("score.weight",), {"score"}),
    ],
)
def test_heads_and_new_weights_train_whole_and_nothing_else_does(family: str, new: tuple[str, ...], whole: set[str]) -> None:
    module = add_lora(make(family, "sequence-classification"), recipe("all-linear"), "sequence-classification", new)
    trained = {name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name}
    plain = {n.removeprefix("base_model.model.").replace("modules_to_save.default.", "").rpartition(".")[0] for n in trained}
    assert plain == whole
    wrapped = [name for name, part in module.named_modules() if isinstance(part, LoraLayer)]
    assert wrapped
    assert not any(name.removeprefix("base_model.model.").startswith(tuple(whole)) for name in wrapped)


def test_a_target_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(TrialError, match=r"no module 'q_prj'; there are: .*; did you mean 'q_proj'\?"):
        add_lora(make("llama", "causal-lm"), recipe("q_prj"), "causal-lm", ())
