"""Prefix tuning against PEFT's own model: loss, gradients, and greedy completions token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_grid import Case
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from tiny import make_language_model
from transformers import AutoModelForCausalLM
from unequal_rows import LENGTHS, base_of, data_of, gradients

from spaces.blueprint import FAMILIES
from spaces.packing import can_pack
from trainables.batching import collate
from trainables.checkpoint import CheckpointStore
from trainables.evaluation import completions, evaluate
from trainables.export import merged_module, save, trained_module, whole_module
from trainables.loop import Command, evaluate_untrained, train
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.packed import packing_for
from trainables.report import TrialError
from trainables.tokenization import IGNORE

WEIGHT = "prompt_encoder.default.embedding.weight"
DECODERS = [f for f in FAMILIES if Case(family=f).task == "causal-lm"]


def case_of(family: str, **knobs: Any) -> Case:
    return Case(family=family, adapter="all-linear", method="prefix", **knobs)


def of_peft(base: BaseModel, weight: torch.Tensor) -> Any:
    """Return a prefix around a model as a user of PEFT makes it."""
    module: Any = base.copy()
    module.set_attn_implementation("eager")
    tokens = len(weight)
    model = get_peft_model(module, PrefixTuningConfig(num_virtual_tokens=tokens, task_type=TaskType.CAUSAL_LM))
    with torch.no_grad():
        model.get_parameter(WEIGHT).copy_(weight)
    return model


class Numbers:
    """A tokenizer whose text is the token ids themselves."""

    @staticmethod
    def decode(ids: Any, *, skip_special_tokens: bool) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.parametrize(
    ("family", "recomputation"),
    [(f, r) for f in DECODERS for r in ("none", "full") if (f, r) != ("gpt2", "full")],
)
def test_rows_laid_end_to_end_learn_what_peft_learns_of_padded_ones(family: str, recomputation: str) -> None:
    config = (case := case_of(family, recomputation=recomputation)).config(1)
    base, data, rows = base_of(case), data_of(case.task), np.arange(len(LENGTHS))
    packing = packing_for(base.module, config, data)
    assert (packing is not None) == can_pack(family)
    module = build(config, base, World.alone()).train()
    parameters = trainable(module)
    assert parameters.keys() == {WEIGHT}
    peft = of_peft(base, parameters[WEIGHT].detach()).train()
    padded = collate(data.train, rows, 0)
    loss, found = gradients(module, [collate(data.train, rows, 0, packing)], case.task)
    expected_loss, expected = gradients(peft, [padded], case.task)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (found[WEIGHT] - expected[WEIGHT]).norm() <= 1e-4 * expected[WEIGHT].norm()
    assert all(part.norm() > 0 for part in found[WEIGHT].chunk(2 * base.shape.num_layers, dim=1)), "a layer is without a prefix"
    # Of one length they need no mask but for the prefix.
    equal = collate(data.train, np.array([1, 2, 3]), 0, packing)
    assert (equal.packed is not None) == can_pack(family)
    assert gradients(module, [equal], case.task)[0] == pytest.approx(
        gradients(peft, [collate(data.train, np.array([1, 2, 3]), 0)], case.task)[0], rel=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2"])
def test_completions_are_those_of_peft_token_by_token(family: str) -> None:
    """With rows of unequal length, whose padding is between the prefix and what it is for."""
    base, data = base_of(case := case_of(family)), data_of("causal-lm")
    module: Any = build(case.config(1), base, World.alone())
    with torch.no_grad():
        module.get_parameter(WEIGHT).mul_(3)
    table = data.evaluation
    prompts = [table.row(i)[0][: 2 + i].tolist() for i in range(len(LENGTHS))]
    targets = np.concatenate([np.where(np.arange(n) < 2 + i, IGNORE, table.row(i)[0]) for i, n in enumerate(LENGTHS)])
    data = replace(data, evaluation=replace(table, targets=targets))
    texts = completions(module, case.config(1), data, data.evaluation, World.alone(), Numbers(), 4)
    peft, limit = of_peft(base, module.get_parameter(WEIGHT)).eval(), int(np.percentile(data.evaluation.num_targets[:4], 95))
    assert len({len(prompt) for prompt in prompts[:4]}) == 4
    for text, prompt in zip(texts, prompts[:4], strict=True):
        tokens = list(prompt)
        for _ in range(limit):
            with torch.no_grad():
                tokens.append(int(peft(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert text == Numbers.decode(tokens[len(prompt) :], skip_special_tokens=True)


def test_a_classifier_has_none() -> None:
    with pytest.raises(TrialError, match=r"space\.adapter: prefix trains keys and values alone: of language models"):
        build(case_of("bert").config(1), case_of("bert").base(), World.alone())


def test_prefixes_of_a_seed_are_the_same_and_of_another_are_others() -> None:
    case = case_of("llama")
    other = replace(case.config(1), recipe=replace(case.config(1).recipe, seed=1))
    first, again, others = (trainable(build(c, case.base(), World.alone()))[WEIGHT] for c in (case.config(1), case.config(1), other))
    assert torch.equal(first, again)
    assert not torch.equal(first, others)


def test_the_untrained_model_is_scored_without_one() -> None:
    base, data, prefixed, plain = (
        base_of(case_of("llama")),
        data_of("causal-lm"),
        case_of("llama").config(1),
        Case(family="llama").config(1),
    )
    assert evaluate_untrained(prefixed, data, base, World.alone(), 0) == evaluate_untrained(plain, data, base, World.alone(), 0)
    random = build(prefixed, base, World.alone())
    loss = evaluate(random, prefixed, data, data.evaluation, World.alone())["eval_loss"]
    assert loss != pytest.approx(evaluate_untrained(plain, data, base, World.alone(), 0)["eval_loss"], rel=1e-4)


def test_an_export_is_loaded_by_peft_alone_and_is_never_merged(tmp_path: Path) -> None:
    base = BaseModel.load(str(make_language_model(tmp_path / "model")), None, "causal-lm", ())
    config = case_of("llama", quantization="nf4").config(1)
    recipe = replace(config.recipe, global_batch_size=4, epochs=4, learning_rate=0.1)
    config, data = replace(config, recipe=recipe, layout=replace(config.layout, micro_batch_size=4)), data_of("causal-lm")
    vocab_size = base.shape.vocab_size
    small = replace(data.train, input_ids=data.train.input_ids % vocab_size, targets=np.minimum(data.train.targets, vocab_size - 1))
    data = replace(data, train=small, evaluation=small)
    trial = tmp_path / "trial"
    list(train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=CheckpointStore(trial)))
    module = trained_module(config, base, trial / "final")
    save(module, base, config, tmp_path / "out")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), str(tmp_path / "out")).eval()
    ids = torch.randint(4, vocab_size, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        expected, found = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (module.eval(), loaded))
        untrained = build(config, base, World.alone()).eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        whole = whole_module(config, base, trial / "final").eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untrained, expected, atol=1e-2), "nothing was learned, so the comparison is empty"
    # That of a model on its quantised base.
    assert not torch.equal(whole, expected)
    torch.testing.assert_close(whole, expected, rtol=0.2, atol=0.2)
    with pytest.raises(ValueError, match=r"no weights stand for a prefix.*: leave --merge out"):
        merged_module(config, base, trial / "final")
