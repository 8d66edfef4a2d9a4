"""What can be known to fail before anything is started."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from search.errors import UserError
from spaces.blueprint import Blueprint
from spaces.config import ADAPTER_KNOBS
from spaces.loading import LoadedSpec, SpecError
from spaces.spec import SearchSpec
from spaces.widths import FP32_BYTES


def check_targets(loaded: LoadedSpec, plan: Blueprint | None) -> None:
    """Check that the modules which adapters are to wrap are there, of a family that is known.

    Raises:
        SpecError: one is not.
    """
    adapted = [adapter for adapter in loaded.spec.space.adapter.ends() if "lora_target_modules" in ADAPTER_KNOBS[adapter]]
    if plan is None or not adapted:
        return
    there = [*plan.block, *plan.head]
    known = sorted({m.name.rpartition(".")[2] for m in there if m.is_module})
    for targets in loaded.spec.space.lora_target_modules.ends():
        for target in () if targets == "all-linear" else targets.split(","):
            is_table = "emb" in target or target.strip() in ("wte", "wpe")  # of which the formulas know the size alone
            if not is_table and not any(m.is_named_by((target.strip(),)) for m in there):
                nearest = difflib.get_close_matches(target.strip(), known, n=1)
                hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
                allowed = f"allowed: all-linear, or of {', '.join(known)}"
                raise SpecError([loaded.locate(f"space.lora_target_modules: no module '{target.strip()}'; {allowed}{hint}")])


def check_room(spec: SearchSpec, plan: Blueprint | None) -> None:
    """Check that the weights of one trial have room where the search writes; of a family that is known.

    Raises:
        UserError: they have not.
    """
    if plan is None:
        return
    place = Path(spec.directory).absolute()
    place = next(path for path in (place, *place.parents) if path.exists())
    # An adapter is small, and where there is a choice full fine-tuning may not fit anyway.
    need = FP32_BYTES * plan.num_params if spec.space.adapter.ends() == ["none"] else 0
    free = shutil.disk_usage(place).free
    if free < need:
        gib = f"{free / 2**30:.2f} GiB are free there, and the weights of one trial take {need / 2**30:.2f} GiB"
        raise UserError(f"directory: {spec.directory}: {gib}")
