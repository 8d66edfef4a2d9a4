"""LoRA and its variants through PEFT."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from spaces.config import Recipe
from trainables.quantize import is_head
from trainables.report import TrialError

# isort: split
# After `trainables.quantize`, which tells the logger of bitsandbytes: PEFT imports that.
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer

TASK_TYPES = {"sequence-classification": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM}


def add_lora(module: nn.Module, recipe: Recipe, task: str, new_parameters: tuple[str, ...]) -> nn.Module:
    """Freeze the model and add trainable low-rank adapters.

    What the pretrained weights lack is trained whole: a low-rank update of random weights would leave them random.

    Args:
        module: the model; changed in place.
        recipe: adapter, rank, alpha and target modules.
        task: the model's task.
        new_parameters: names of the parameters that were drawn anew.

    Raises:
        TrialError: a target module does not exist in the model.
    """
    targets = recipe.adapter_target_modules or ()
    _check_targets(module, targets)
    new = {name.rpartition(".")[0] for name in new_parameters}
    heads = {name for name, _ in module.named_modules() if is_head(name)}
    config = LoraConfig(
        task_type=TASK_TYPES[task],
        r=recipe.adapter_rank or 0,
        lora_alpha=recipe.adapter_alpha or 0.0,  # type: ignore[arg-type]  # PEFT takes a float too
        exclude_modules=sorted(new | heads) or None,
        modules_to_save=sorted(new - heads) or None,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        # Dropout would make the loss curve depend on the layout.
        lora_dropout=0.0,
        use_rslora=recipe.adapter == "rslora",
        use_dora=recipe.adapter == "dora",
    )
    adapted = get_peft_model(module, config)
    for part in adapted.modules():
        if isinstance(part, DoraLinearLayer):
            part.get_lora_weight = _product
    return adapted


@torch.no_grad()
def _product(lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: str | None = None) -> torch.Tensor:
    """Return B A, of which DoRA takes norms without a gradient; PEFT sends the identity through both, as wide as the layer."""
    return lora_B.weight @ lora_A.weight


def _check_targets(module: nn.Module, targets: tuple[str, ...]) -> None:
    if targets == ("all-linear",):
        return
    known = sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in module.named_modules()):
            close = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise TrialError(f"space.lora_target_modules: no module '{target}'; there are: {', '.join(known)}{hint}")
