"""FLOPs against `FlopCounterMode`, which counts what torch really dispatches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from spaces.architecture import ModelShape
from spaces.config import Recipe
from spaces.flops import AttentionShape, LinearUse, training_flops
from spaces.hardware import peak_flops_per_second
from trainables.adapters import add_lora
from trainables.batching import Batch
from trainables.evaluation import summed_loss
from trainables.meter import counting

ROWS, LENGTH = 3, 24


def make(kind: str):
    set_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)), "causal-lm"
    if kind == "tied":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=4, tie_word_embeddings=True)), "causal-lm"
    if kind == "gpt2":
        config = GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)
        return GPT2LMHeadModel(config), "causal-lm"
    return BertForSequenceClassification(BertConfig(**shape, num_labels=5)), "sequence-classification"


def lora(targets: tuple[str, ...]) -> Recipe:
    return Recipe(
        learning_rate=1,
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


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert"])
@pytest.mark.parametrize("adapter", ["none", "all-linear", "some"])
def test_the_formula_is_what_torch_computes(kind: str, adapter: str) -> None:
    module, task = make(kind)
    shape = ModelShape.from_config({**module.config.to_dict(), "architectures": [type(module).__name__]})
    some = {"llama": ("q_proj", "v_proj"), "tied": ("k_proj", "down_proj"), "gpt2": ("c_attn",), "bert": ("query", "value")}
    if adapter != "none":
        module = add_lora(module, lora(("all-linear",) if adapter == "all-linear" else some[kind]), task)
    ids = torch.randint(1, 97, (ROWS, LENGTH))
    targets = ids if task == "causal-lm" else torch.tensor([0, 1, 2])
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets)
    uses: list[LinearUse] = []
    # The default attention kernel of the CPU is not in the counter's table: the mathematical one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, counting(module, batch, uses):
        loss, _, _ = summed_loss(module, batch, task)
        loss.backward()
    # The counter does not halve causal attention.
    attention = AttentionShape(num_layers=shape.num_layers, num_heads=shape.num_heads, head_dim=shape.head_dim, causal=False)
    ours = training_flops(uses, attention, num_tokens=ROWS * LENGTH, num_rows=ROWS, sum_of_squared_lengths=ROWS * LENGTH**2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_causal_attention_costs_half_and_padding_nothing() -> None:
    whole = AttentionShape(num_layers=2, num_heads=4, head_dim=8, causal=False)
    half = AttentionShape(num_layers=2, num_heads=4, head_dim=8, causal=True)
    assert half.flops(100.0) == whole.flops(100.0) / 2 == 12 * 2 * 4 * 8 * 100.0 / 2
    use = LinearUse(num_weights=10, per="token", input_needs_grad=True, weight_needs_grad=False)
    assert use.flops(num_tokens=7, num_rows=2) == 4 * 10 * 7


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.0e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312.0e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121.0e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_a_device_has_its_own_peak_or_none(name: str, bf16: float | None) -> None:
    assert peak_flops_per_second(name, "bf16") == bf16
