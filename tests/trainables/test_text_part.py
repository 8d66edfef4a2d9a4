"""Models that see beside reading: what trains is what text goes through, and what is exported is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import make
from memory_grid import Case
from peft import PeftModel
from tiny import save_tokenizer
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    set_seed,
)
from unequal_rows import LENGTHS, data_of, gradients

from spaces.architecture import ModelShape
from spaces.blueprint import blueprint
from spaces.memory import num_trained
from trainables.batching import collate
from trainables.checkpoint import CheckpointStore
from trainables.export import for_use, merged_module, save, trained_module
from trainables.hub import class_for, model_config
from trainables.loop import Command, train
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.packed import packing_for
from trainables.text_part import take_out
from trainables.tokenization import IGNORE

TEXT = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 160, "head_dim": 16, "sliding_window": 512, "attention_dropout": 0.3, "pad_token_id": 0}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION |= {"image_size": 56, "patch_size": 14}


def _gemma3() -> Any:
    config = Gemma3Config(text_config={"model_type": "gemma3_text", **TEXT}, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def _mistral3() -> Any:
    """Of which transformers has no class that writes alone: Ministral 3 is published so."""
    config = CONFIG_MAPPING["mistral3"](
        text_config={"model_type": "ministral3", **TEXT, "sliding_window": None},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16},
        image_token_index=96,
    )
    return AutoModelForImageTextToText.from_config(config)


@pytest.fixture(scope="module", params=["gemma3_text", "ministral3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    """Return a model with a tower of pictures, as Gemma 3 of 4B and more, with random weights."""
    set_seed(0)
    path = tmp_path_factory.mktemp(family)
    (_gemma3() if family == "gemma3_text" else _mistral3()).save_pretrained(path)
    save_tokenizer(path, eos_token="[SEP]")
    return path


@pytest.fixture
def base(directory: Path) -> BaseModel:
    return BaseModel.load(str(directory), None, "causal-lm", ())


def whole(directory: Path) -> Any:
    """Return the model as transformers loads it, without dropout."""
    kind: Any = getattr(transformers, str(class_for(model_config(str(directory), None), "causal-lm")))
    return kind.from_pretrained(directory).eval()


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_all_that_trains_is_read_and_learns_of_packed_rows_what_it_learns_of_each_alone(
    base: BaseModel, directory: Path, family: str, adapter: str, recomputation: str
) -> None:
    case = Case(family=family, adapter=adapter, recomputation=recomputation)
    config, data = case.config(1), data_of("causal-lm")
    packing = packing_for(base.module, config, data)
    assert packing is not None
    module = build(config, base, World.alone()).train()
    loss, found = gradients(module, [collate(data.train, np.arange(len(LENGTHS)), 0, packing)], "causal-lm")
    assert found.keys() == trainable(module).keys(), "DDP waits for all"
    plan = blueprint(AutoConfig.from_pretrained(directory).to_dict(), "causal-lm")
    assert sum(gradient.numel() for gradient in found.values()) == num_trained(plan, config.recipe)
    plain, expected = whole(directory), 0.0
    for i in range(len(LENGTHS)):
        ids, targets = (torch.from_numpy(np.array(part)).long()[None] for part in data.train.row(i))
        logits = plain(input_ids=ids).logits[:, :-1].flatten(0, 1)
        expected += float(functional.cross_entropy(logits, targets[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE).detach())
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora", "oft"])
@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_is_whole_and_its_tower_as_it_was(
    base: BaseModel, directory: Path, family: str, tmp_path: Path, adapter: str, merge: bool
) -> None:
    if merge and adapter == "none":
        pytest.skip("nothing to merge")
    case = Case(
        family="gemma3_text", adapter="none" if adapter == "none" else "all-linear", method=adapter if adapter != "none" else "lora"
    )
    config, data = case.config(1), case.data(4)
    list(
        train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=CheckpointStore(tmp_path / "trial"))
    )
    weights = tmp_path / "trial/final"
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = for_use(trained_module(config, base, weights), base).eval()(input_ids=ids).logits
    save((merged_module if merge else trained_module)(config, base, weights), base, config, tmp_path / "out")
    original = whole(directory)
    if adapter == "none" or merge:
        loaded = whole(tmp_path / "out")
        own = loaded
    else:
        loaded = PeftModel.from_pretrained(whole(directory), str(tmp_path / "out"))
        assert not [name for name, _ in loaded.named_parameters() if "lora" in name and "vision" in name]
        own = loaded.get_base_model()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(original(input_ids=ids).logits, expected, atol=1e-3), "nothing was learned"
    tower = dict(original.model.vision_tower.named_parameters())
    assert tower
    assert all(torch.equal(value, tower[name]) for name, value in own.model.vision_tower.named_parameters())
    assert own.config.text_config.attention_dropout == 0.3
    assert base.module.config.text_config.attention_dropout == 0.0
    assert [name for name in base.unread] == ["model.vision_tower", "model.multi_modal_projector"]


def test_a_model_that_only_reads_is_whole(tmp_path: Path) -> None:
    make("llama", "causal-lm").save_pretrained(tmp_path)
    assert BaseModel.load(str(tmp_path), None, "causal-lm", ()).unread == {}


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_a_classifier_keeps_its_head(directory: Path, family: str, adapter: str) -> None:
    if family == "ministral3":
        pytest.skip("transformers has none")
    base = BaseModel.load(str(directory), None, "sequence-classification", ("a", "b", "c"), 0)
    assert "score" not in base.unread
    assert base.new_parameters == ("score.weight",)
    config, data = Case(family=family, adapter=adapter).config(1), data_of("sequence-classification")
    module = build(config, base, World.alone()).train()
    loss, found = gradients(module, [collate(data.train, np.arange(len(LENGTHS)), 0)], "sequence-classification")
    assert loss > 0
    assert found.keys() == trainable(module).keys()


def test_what_text_goes_through_by_another_way_stays(directory: Path) -> None:
    """As in Gemma 3n, whose towers' embeddings its text's tokens are looked up in too."""
    module = whole(directory)
    tower = module.model.vision_tower
    tower.offset = 0
    module.register_forward_pre_hook(lambda model, *_: model.model.vision_tower.offset and None)
    assert take_out(module) == {}
    assert module.model.vision_tower is tower


def test_settings_come_back_of_a_model_that_is_the_text_s_part_of_its_files(tmp_path: Path) -> None:
    """Qwen 3.5's, and Llama 4's."""
    text = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 96, "head_dim": 16, "attention_dropout": 0.3, "layer_types": ["full_attention"] * 2}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    base = BaseModel.load(str(tmp_path), None, "causal-lm", ())
    assert base.module.config.attention_dropout == 0.0
    assert for_use(base.module, base).config.attention_dropout == 0.3


def test_files_may_leave_out_what_is_usual_of_the_part_that_reads(tmp_path: Path) -> None:
    """As those of Gemma 3 of 4B do, which has 8 heads and 262,208 tokens."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": VISION,
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = model_config(str(tmp_path), None)
    shape = ModelShape.from_config(config)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.vocab_size, shape.causal) == (8, 4, 256, 262_208, True)
    assert config["text_config"]["num_hidden_layers"] == 34
    assert blueprint(config, "causal-lm").num_params == pytest.approx(3.88e9, rel=0.01), "without its tower of pictures"
