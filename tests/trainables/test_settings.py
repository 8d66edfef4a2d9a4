"""What is switched off while a model trains comes back in what is exported."""

from __future__ import annotations

from typing import Any

import torch
from families import batch_of
from transformers import AutoConfig, AutoModelForCausalLM, PhimoeConfig, set_seed

from trainables.loss import TrainingLoss
from trainables.settings import restore, switch_off

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "num_local_experts": 4, "pad_token_id": 0}


def test_the_noise_on_the_choice_of_experts_is_none_while_a_model_trains() -> None:
    config = PhimoeConfig(**SIZES, router_jitter_noise=0.1)
    batch = batch_of("causal-lm", torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0)))

    def losses() -> list[float]:
        set_seed(0)
        module = AutoModelForCausalLM.from_config(config).train()
        return [float(TrainingLoss("causal-lm")(module, batch).detach()) for _ in range(2)]

    first, second = losses()
    assert first != second, "nothing to switch off"
    switch_off(config)
    first, second = losses()
    assert first == second


def test_settings_inside_others_are_switched_off_and_come_back() -> None:
    def made() -> Any:
        text = {"model_type": "gemma3_text", "attention_dropout": 0.3}
        return AutoConfig.for_model("gemma3", text_config=text, vision_config={"attention_dropout": 0.2})

    config = made()
    switch_off(config)
    assert (config.text_config.attention_dropout, config.vision_config.attention_dropout, config.text_config.use_cache) == (
        0,
        0,
        False,
    )
    restore(config, made())
    assert config.to_dict() == made().to_dict()
