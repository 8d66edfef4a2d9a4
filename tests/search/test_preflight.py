"""What can be known to fail before anything is started."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import config_of, make
from tiny import make_spec

from search.errors import UserError
from search.preflight import check_room, check_targets
from spaces.blueprint import Blueprint, blueprint
from spaces.loading import SpecError, load_spec


@pytest.fixture(scope="module")
def plan() -> Blueprint:
    return blueprint(config_of(make("bert", "sequence-classification")), "sequence-classification", 5)


def test_tables_are_no_matrices_of_the_formulas_and_other_adapters_take_no_names(tmp_path: Path, plan: Blueprint) -> None:
    check_targets(load_spec(make_spec(tmp_path, space={"lora_target_modules": "word_embeddings,query"})), plan)
    check_targets(load_spec(make_spec(tmp_path, space={"adapter": "bottleneck", "lora_target_modules": "q_proj"})), plan)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("all-linear", ""),
        ("query,value", ""),
        ("attention.output.dense", ""),
        (
            {"choice": ["all-linear", "query, valeu"]},
            r"no module 'valeu'; allowed: all-linear, or of .*query.*; did you mean 'value'\?",
        ),
        ("q_proj", r"spec\.yaml:\d+: space\.lora_target_modules: no module 'q_proj'; allowed: all-linear, or of "),
    ],
)
def test_modules_that_a_known_family_lacks_are_told_before_a_start(tmp_path: Path, plan: Blueprint, targets: Any, words: str) -> None:
    loaded = load_spec(make_spec(tmp_path, space={"lora_target_modules": targets}))
    check_targets(loaded, None)
    if not words:
        check_targets(loaded, plan)
        return
    with pytest.raises(SpecError, match=words) as caught:
        check_targets(loaded, plan)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("adapter", "is_small"), [("none", True), ({"choice": ["none", "lora"]}, False), ("lora", False)])
def test_a_disk_without_room_for_one_trial_is_told(
    tmp_path: Path, plan: Blueprint, monkeypatch: pytest.MonkeyPatch, adapter: Any, is_small: bool
) -> None:
    spec = load_spec(make_spec(tmp_path, space={"adapter": adapter})).spec
    check_room(spec, plan)
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or SimpleNamespace(free=4 * plan.num_params - 1))
    check_room(spec, None)
    if not is_small:
        check_room(spec, plan)
        return
    with pytest.raises(UserError, match=r"directory: .*runs: 0\.00 GiB are free there, and the weights of one trial take 0\.00 GiB"):
        check_room(spec, plan)
    assert asked[-1] == tmp_path, "the directory itself is not there yet"
