"""What is exported, loaded as a user of transformers and PEFT loads it, against the model that was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from families import make
from memory_grid import Case
from peft import AutoPeftModelForSequenceClassification, PeftModel
from tiny import make_language_model, make_model, make_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    pipeline,
)
from unequal_rows import data_of

from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec
from spaces.space import SpaceSpec
from trainables import bottleneck
from trainables.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from trainables.data import TaskData
from trainables.evaluation import evaluate
from trainables.export import as_saved, merged_module, save, scores, trained_module, unquantized, whole_module
from trainables.loop import Command, train
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.preparation import prepare
from trainables.quantize import Packed, pack_linears
from trainables.whole import load_weights

Parts = tuple[TaskData, BaseModel]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    directory = tmp_path_factory.mktemp("export")
    model = ModelSpec(name=str(make_model(directory / "model")), task="sequence-classification", max_length=32)
    data = prepare(model, DataSpec(train=str(make_rows(directory / "train.csv", num_rows=120))))
    return data, BaseModel.load(model.name, None, model.task, data.label_names)


def config_of(**knobs: Any) -> TrialConfig:
    space = SpaceSpec.model_validate({"global_batch_size": 8, "dataset_fraction": 1.0, "learning_rate": 5e-3, "epochs": 2, **knobs})
    return TrialConfig.from_params(space.first())


def finished(parts: Parts, directory: Path, config: TrialConfig) -> tuple[Path, float]:
    """Train; return where the weights are, and the accuracy."""
    data, base = parts
    checkpoints = CheckpointStore(directory)
    reports = list(train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=checkpoints))
    return directory / "final", reports[-1].metrics["accuracy"]


def trained(base: BaseModel, weights: Path, config: TrialConfig) -> Any:
    """Return the model as it was trained."""
    module = build(config, base, World.alone())
    load_weights(trainable(module), read_checkpoint(weights).weights)
    return module


def logits_of(module: Any) -> torch.Tensor:
    ids = torch.randint(4, 20, (6, 12), generator=torch.Generator().manual_seed(3))
    module.eval()
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()


def base_weights(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.module.state_dict().items()}


@pytest.mark.parametrize("adapter", ["none", "lora", "rslora", "dora", "vera", "ia3", "oft"])
@pytest.mark.parametrize("merge", [False, True])
def test_it_loads_with_plain_libraries_and_computes_what_was_trained(parts: Parts, tmp_path: Path, adapter: str, merge: bool) -> None:
    if merge and adapter == "none":
        pytest.skip("nothing to merge")
    data, base = parts
    config = config_of(adapter=adapter)
    before = base_weights(base)
    weights, _ = finished(parts, tmp_path / "trial", config)
    expected = logits_of(trained(base, weights, config))
    untrained = logits_of(build(config, base, World.alone()))
    save((merged_module if merge else trained_module)(config, base, weights), base, config, tmp_path / "out")
    if adapter != "none" and not merge:
        settings = AutoConfig.from_pretrained(tmp_path / "out")
        loaded = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base.name, config=settings, ignore_mismatched_sizes=True),
            str(tmp_path / "out"),
        )
        options = {"num_labels": 3, "ignore_mismatched_sizes": True}  # the base has a head of another size
        by_name = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **options)
        torch.testing.assert_close(logits_of(by_name), expected, rtol=1e-4, atol=1e-5)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untrained, expected, atol=1e-2), "nothing was learned, so the comparison is empty"
    assert all(torch.equal(value, before[name]) for name, value in base.module.state_dict().items()), "other trials share it"
    assert loaded.config.id2label == dict(enumerate(data.label_names))
    assert loaded.config.hidden_dropout_prob == AutoConfig.from_pretrained(base.name).hidden_dropout_prob > 0


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "vera", "ia3", "oft"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi3", "mixtral"])
def test_a_merged_language_model_computes_what_was_trained(tmp_path: Path, family: str, method: str) -> None:
    if (family, method) in (("gpt2", "oft"), ("mixtral", "dora"), ("mixtral", "vera"), ("mixtral", "oft"), ("mixtral", "ia3")):
        pytest.skip("there is none")
    case = Case(family=family, adapter="all-linear", method=method)
    data, base, config = case.data(4), case.base(), case.config(1)
    before = base_weights(base)
    weights, _ = finished((data, base), tmp_path / "trial", replace(config, recipe=replace(config.recipe, learning_rate=3e-2)))
    expected, untrained = logits_of(trained(base, weights, config)), logits_of(base.module)
    torch.testing.assert_close(logits_of(merged_module(config, base, weights)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(untrained, expected, atol=1e-2), "nothing was learned, so the comparison is empty"
    assert all(torch.equal(value, before[name]) for name, value in base.module.state_dict().items()), "other trials share it"


@pytest.mark.parametrize("method", ["ia3", "vera", "oft"])
def test_an_adapter_beside_a_head_of_several_layers_is_merged(tmp_path: Path, method: str) -> None:
    """RoBERTa's, which is no layer with a weight."""
    base = replace(Case(family="roberta", adapter="all-linear", method=method).base(), new_parameters=HEAD)
    case = Case(family="roberta", adapter="all-linear", method=method)
    config, data = case.config(1), data_of("sequence-classification")
    list(train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=CheckpointStore(tmp_path)))
    expected, merged = logits_of(trained(base, tmp_path / "final", config)), merged_module(config, base, tmp_path / "final")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
    assert type(merged.classifier).__name__ == "RobertaClassificationHead"


HEAD = tuple(f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("bias", "weight"))


def test_bottlenecks_load_with_the_file_that_goes_with_them(parts: Parts, tmp_path: Path) -> None:
    data, base = parts
    config, before = config_of(adapter="bottleneck", lora_rank=4), base_weights(base)
    weights, accuracy = finished(parts, tmp_path / "trial", config)
    expected = logits_of(trained(base, weights, config))
    save(trained_module(config, base, weights), base, config, tmp_path / "out")
    # In a process that has nothing of ours.
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from bottleneck import load
from transformers import AutoConfig, AutoModelForSequenceClassification
config = AutoConfig.from_pretrained(sys.argv[2])
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], config=config, ignore_mismatched_sizes=True)
model = load(base, sys.argv[2]).eval()
ids = torch.randint(4, 20, (6, 12), generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    torch.save(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, sys.argv[3])
"""
    paths = [base.name, str(tmp_path / "out"), str(tmp_path / "logits")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script, *paths], check=True, cwd=tmp_path, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-5)
    untrained = logits_of(build(config, base, World.alone()))
    assert not torch.allclose(untrained, expected, atol=1e-2), "nothing was learned, so the comparison is empty"
    assert all(torch.equal(value, before[name]) for name, value in base.module.state_dict().items()), "other trials share it"
    assert scores(trained_module(config, base, weights), config, data, base, 0)["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    with pytest.raises(ValueError, match="not linear: leave --merge out"):
        merged_module(config, base, weights)


def test_a_pipeline_names_the_labels(parts: Parts, tmp_path: Path) -> None:
    data, base = parts
    config = config_of(adapter="lora", epochs=8)
    weights, _ = finished(parts, tmp_path / "trial", config)
    save(merged_module(config, base, weights), base, config, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["the match saw a goal team score ball", "bread soup rice today cheese", "rain and sun and wind"]
    module = trained(base, weights, config).eval()
    expected = [data.label_names[int(module(**tokenizer(text, return_tensors="pt")).logits.argmax())] for text in texts]
    assert len(set(expected)) > 1
    classify = pipeline("text-classification", model=str(tmp_path / "out"), tokenizer=tokenizer, device="cpu")
    assert [row["label"] for row in classify(texts)] == expected


@pytest.mark.parametrize("adapter", ["none", "lora", "bottleneck"])
def test_a_whole_model_computes_what_was_trained_in_its_number_format(parts: Parts, tmp_path: Path, adapter: str) -> None:
    _, base = parts
    knobs = {} if adapter == "none" else {"quantization": "nf4", "lora_rank": 4}
    config = config_of(adapter=adapter, **knobs)
    weights, _ = finished(parts, tmp_path / "trial", config)
    expected = logits_of(trained(base, weights, config))
    torch.testing.assert_close(logits_of(whole_module(config, base, weights)), expected, rtol=1e-3, atol=1e-4)
    if adapter != "none":
        plain = whole_module(replace(config, recipe=replace(config.recipe, quantization="none")), base, weights)
        assert not torch.allclose(logits_of(plain), expected, atol=1e-3), "quantising changed nothing, so the comparison is empty"
    halved = replace(config, recipe=replace(config.recipe, precision="bf16"))
    assert {p.dtype for p in whole_module(halved, base, weights).parameters()} == {torch.bfloat16}


def test_bottlenecks_of_another_model_are_refused(parts: Parts, tmp_path: Path) -> None:
    _, base = parts
    config = config_of(adapter="bottleneck", lora_rank=4)
    weights, _ = finished(parts, tmp_path / "trial", config)
    save(trained_module(config, base, weights), base, config, tmp_path / "out")
    for other in (make("llama", "sequence-classification"), make("bert", "sequence-classification")):
        before = set(other.state_dict())
        with pytest.raises(ValueError, match=r"another model's: .* should have 32 outputs, and has"):
            bottleneck.load(other, tmp_path / "out")
        assert set(other.state_dict()) == before
    model = bottleneck.load(base.copy(), tmp_path / "out")
    with pytest.raises(ValueError, match="another model's"):
        bottleneck.load(model, tmp_path / "out")


@pytest.mark.parametrize("method", ["nf4", "int8", "float8"])
def test_a_quantised_base_is_spread_out_before_it_is_merged(parts: Parts, tmp_path: Path, method: str) -> None:
    data, base = parts
    config = config_of(adapter="lora", quantization=method, lora_rank=4)
    before = base_weights(base)
    weights, accuracy = finished(parts, tmp_path / "trial", config)
    merged = merged_module(config, base, weights)
    plain = merged_module(replace(config, recipe=replace(config.recipe, quantization="none")), base, weights)
    packed = pack_linears(base.module, config.recipe.quantization, torch.float32, torch.device("cpu"), base.new_parameters)
    assert len(packed) > 10
    spread_by: dict[str, Callable[[Packed], torch.Tensor]] = {
        "nf4": lambda held: dequantize_4bit(held.weight, held.state),
        "int8": lambda held: held.weight * held.scales[:, None] / 127,
        "float8": lambda held: held.weight.view(torch.float8_e4m3fn).float() * held.scales[:, None],
    }
    for name, weight in packed.items():
        spread = spread_by[method](weight)
        ours, original = merged.get_submodule(name).weight, before[f"{name}.weight"]
        assert not torch.allclose(spread, original, atol=1e-4), "nothing was quantised, so the comparison is empty"
        torch.testing.assert_close(ours - plain.get_submodule(name).weight, spread - original, rtol=0, atol=1e-5)
    # int8 products round their inputs too, which no weight can.
    tolerance = {"rtol": 0.05, "atol": 0.05} if method == "int8" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits_of(merged), logits_of(trained(base, weights, config)), **tolerance)
    assert all(torch.equal(value, before[name]) for name, value in base.module.state_dict().items())
    assert scores(merged, config, data, base, 0)["accuracy"] == pytest.approx(accuracy, abs=0.1)


@pytest.mark.parametrize("adapter", ["rslora", "dora", "oft"])
def test_other_adapters_are_merged_into_what_a_quantised_base_stands_for(parts: Parts, tmp_path: Path, adapter: str) -> None:
    _, base = parts
    config = config_of(adapter=adapter, quantization="nf4", lora_rank=4)
    weights, _ = finished(parts, tmp_path / "trial", config)
    merged, expected = merged_module(config, base, weights), logits_of(trained(base, weights, config))
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
    plain = merged_module(replace(config, recipe=replace(config.recipe, quantization="none")), base, weights)
    assert not torch.allclose(logits_of(plain), expected, atol=1e-3), "nothing was quantised, so the comparison is empty"


def test_a_bf16_trial_is_saved_in_bf16_and_scores_the_same(parts: Parts, tmp_path: Path) -> None:
    data, base = parts
    config = config_of(adapter="lora", precision="bf16")
    weights, accuracy = finished(parts, tmp_path / "trial", config)
    save(merged_module(config, base, weights), base, config, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert evaluate(loaded, config, data, data.evaluation, World.alone())["accuracy"] == pytest.approx(accuracy, abs=0.1)


def test_damaged_weights_are_refused(parts: Parts, tmp_path: Path) -> None:
    weights, _ = finished(parts, tmp_path, config_of(adapter="lora"))
    file = weights / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        trained_module(config_of(adapter="lora"), parts[1], weights)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_adapter_of_a_quantised_base_loads_onto_one(parts: Parts, tmp_path: Path, method: str) -> None:
    _, base = parts
    config = config_of(adapter="lora", quantization=method, lora_rank=4)
    weights, _ = finished(parts, tmp_path / "trial", config)
    module = trained_module(config, base, weights)
    save(module, base, config, tmp_path / "out")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    how = BitsAndBytesConfig(**(four if method == "nf4" else {"load_in_8bit": True}), llm_int8_skip_modules=unquantized(module))
    quantized = AutoModelForSequenceClassification.from_pretrained(
        base.name,
        config=AutoConfig.from_pretrained(tmp_path / "out"),
        quantization_config=how,
        ignore_mismatched_sizes=True,
    )
    loaded = PeftModel.from_pretrained(quantized, str(tmp_path / "out"))
    for part in loaded.modules():
        if isinstance(part, Linear4bit):
            part.support_avx512bf16_for_cpu = False  # a kernel of some CPUs that knows no layers as small as these
    torch.testing.assert_close(logits_of(loaded), logits_of(trained(base, weights, config)), rtol=1e-2, atol=1e-3)


def test_an_adapter_on_a_tied_output_embedding_is_not_merged(tmp_path: Path) -> None:
    make("gpt2", "causal-lm").save_pretrained(tmp_path / "model")
    base = BaseModel.load(str(tmp_path / "model"), None, "causal-lm", ())
    config = config_of(adapter="lora", lora_target_modules="c_attn, lm_head")
    with pytest.raises(ValueError, match="output embedding"):
        merged_module(config, base, _untrained(config, base, tmp_path / "trial"))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_model_that_learned_chats_ends_behind_a_turn(tmp_path: Path, adapter: str) -> None:
    base = BaseModel.load(str(make_language_model(tmp_path / "model")), None, "causal-lm", ())
    config, prompt = config_of(adapter=adapter), torch.tensor([[4, 9, 12]])
    module = trained_module(config, base, _untrained(config, base, tmp_path / "trial"))
    # Greedy, the next token is always the same one: let it be what ends a turn.
    end = int(module(input_ids=prompt).logits[0, -1].argmax())
    save(module, base, config, tmp_path / "out", end_token_ids=(3, end))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" if adapter == "none" else base.name)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == [3, end]
    options = {"do_sample": False, "max_new_tokens": 5, "attention_mask": torch.ones_like(prompt)}
    assert model.generate(prompt, **options, generation_config=settings).shape[1] == 4
    assert model.generate(prompt, **options, eos_token_id=3).shape[1] == 8, "as the base ends"


def test_settings_of_generation_that_are_not_written_once_they_change_are_left_out_and_greedy_stays_greedy(tmp_path: Path) -> None:
    """Some models of the hub have a temperature and do not sample, which transformers reads and does not write."""
    (make_language_model(tmp_path / "model") / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 3}')
    base = BaseModel.load(str(tmp_path / "model"), None, "causal-lm", ())
    config = config_of(adapter="none")
    for name, ends, expected in (("same", (3,), (3, 0.7)), ("more", (3, 7), ([3, 7], None))):
        module = trained_module(config, base, _untrained(config, base, tmp_path / "trial"))
        save(module, base, config, tmp_path / name, end_token_ids=ends)
        settings = GenerationConfig.from_pretrained(tmp_path / name)
        assert (settings.eos_token_id, settings.temperature) == expected
        assert not settings.do_sample


def test_beside_an_adapter_the_base_is_loaded_as_the_trial_computed(parts: Parts, tmp_path: Path) -> None:
    _, base = parts
    config = config_of(adapter="lora", precision="bf16")
    save(trained_module(config, base, _untrained(config, base, tmp_path / "trial")), base, config, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_template_of_the_user_is_the_exported_tokenizers(parts: Parts, tmp_path: Path) -> None:
    _, base = parts
    config, template = config_of(adapter="none"), "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    for name, given in (("own", None), ("given", template)):
        module = trained_module(config, base, _untrained(config, base, tmp_path / "trial"))
        save(module, base, config, tmp_path / name, chat_template=given)
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == given


def _untrained(config: TrialConfig, base: BaseModel, directory: Path) -> Path:
    parameters = trainable(build(config, base, World.alone()))
    weights = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    state = {"config": config.to_dict(), "step": 0}
    return CheckpointStore(directory).save_final(Checkpoint(weights=weights, optimizer={}, state=state))


def test_an_adapters_files_name_the_base_on_the_hub(parts: Parts, tmp_path: Path) -> None:
    _, base = parts
    config = config_of(adapter="lora")
    weights, _ = finished(parts, tmp_path / "trial", config)
    save(trained_module(config, base, weights), base, config, tmp_path / "out", origin="org/name")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")]
)
def test_what_does_not_fit_a_gpu_is_scored_on_the_cpu(error: RuntimeError, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    data, base = parts
    config = config_of(adapter="none")
    module = build(config, base, World.alone())
    expected, moves = scores(module, config, data, base, 0), []
    move = torch.nn.Module.to

    def to(self: torch.nn.Module, device: Any, *args: Any) -> torch.nn.Module:
        moves.append(str(device))
        if str(device) == "cuda":
            raise error
        return move(self, device, *args)

    monkeypatch.setattr("trainables.export.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    assert scores(module, config, data, base, 0) == expected
    assert moves[:2] == ["cuda", "cpu"]


def test_in_bf16_weights_are_rounded_and_tables_of_positions_are_not() -> None:
    """A model that is loaded in bf16 has them in fp32."""
    base = Case(family="llama").base()
    tables = {name: table.clone() for name, table in base.module.named_buffers() if table.is_floating_point()}
    module = as_saved(base.copy(), config_of(adapter="none", precision="bf16"))
    assert tables
    assert all(torch.equal(table, tables[name]) for name, table in module.named_buffers() if name in tables)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
