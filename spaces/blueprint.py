"""Every weight of a model and what it costs, from its `config.json` alone: the families of the hub that people fine-tune.

What a family is made of is that of its modelling file in https://github.com/huggingface/transformers/tree/main/src/transformers/models;
tests compare every count with the model that transformers builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from spaces.architecture import DECODERS, ENCODERS, ModelShape, ShapeError

Task = Literal["sequence-classification", "causal-lm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A linear layer, as many times as there are experts."""

    name: str
    """Its module's full name, with `*` for the number of the layer."""
    num_inputs: int
    num_outputs: int
    has_bias: bool = False
    per: Literal["token", "target"] = "token"
    """Whether it is applied at every position, or where the loss counts: target tokens, or once a classified row."""
    num_experts: int = 1
    num_active: int = 1
    """Experts that one token meets."""
    is_module: bool = True
    """Whether it is an `nn.Linear` of its own, which LoRA can wrap; experts of one stacked weight are not."""
    is_output: bool = False
    """Whether it is the output embedding, which `all-linear` leaves out."""
    trains_with_adapter: bool = False
    """Whether PEFT trains it whole beside an adapter: the head of a classifier."""

    def is_wrapped_by(self, targets: tuple[str, ...]) -> bool:
        """Return whether LoRA with these target modules wraps it."""
        if not self.is_module:
            return False
        return not self.is_output if targets == ("all-linear",) else self.is_named_by(targets)

    def is_named_by(self, targets: tuple[str, ...]) -> bool:
        """Return whether a target is its full name or ends it after a dot: PEFT's rule.

        Of a target that names one layer every layer is counted: the blocks of a blueprint are equal.
        """
        names = (".".join("*" if part.isdigit() else part for part in target.split(".")) for target in targets)
        return any(self.name == name or self.name.endswith(f".{name}") for name in names)

    @property
    def num_weights(self) -> int:
        """Weights that one token meets, without the bias."""
        return self.num_inputs * self.num_outputs * self.num_active

    @property
    def num_params(self) -> int:
        """Parameters that are held, with the bias."""
        return (self.num_inputs + self.has_bias) * self.num_outputs * self.num_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A model as its weights: tables, equal blocks, and what comes after them."""

    family: str
    """The `model_type` of its `config.json`."""
    shape: ModelShape
    num_embedding_params: int
    """Look-up tables and their normalisation; a tied head is this table."""
    attention_in: tuple[Matrix, ...]
    """The projections of a block that attention waits for."""
    attention_out: tuple[Matrix, ...]
    feed_forward_in: tuple[Matrix, ...]
    feed_forward_out: tuple[Matrix, ...]
    num_block_vector_params: int
    """Normalisation of one block."""
    num_final_vector_params: int
    head: tuple[Matrix, ...]
    """Linear layers after the last block, in their order."""
    is_head_tied: bool
    is_attention_fused: bool
    """Whether scores and weights are never held as tensors; Gemma 2 caps the scores in between, so its are."""
    norm: Literal["rms", "layer"]
    num_norms_per_block: int
    has_head_norms: bool
    """Whether queries and keys are normalised head by head."""
    num_kept_by_activation: int
    """Tensors of the feed-forward's inner width that its backward pass needs: before and after every product and function."""
    are_logits_capped: bool = False
    """Whether the scores of the tokens go through a tanh."""
    is_norm_weighed_in_fp32: bool = False
    """Whether normalisation returns to the model's number format after its weight and not before."""
    num_idle_params: int = 0
    """Of the embedding, in rows that no token of the training data has; known once there are data."""
    are_experts_weighed_in_fp32: bool = False
    """Whether the router's probabilities stay in fp32 whatever the model computes in."""
    num_positions: int | None = None
    """Tokens that a row may have, with a prefix before it; None where the configuration does not say."""
    ends_at_first_tokens: bool = False
    """Whether the last block computes what follows its attention for the first token of a row alone, which the class is told by."""

    @property
    def block(self) -> tuple[Matrix, ...]:
        """The linear layers of one block, in the order of the forward pass."""
        return (*self.attention_in, *self.attention_out, *self.feed_forward_in, *self.feed_forward_out)

    def after_attention(self, *, is_last: bool) -> tuple[tuple[Matrix, ...], ...]:
        """Return the matrices of a block that follow its attention, those side by side together."""
        stages = (self.attention_out, self.feed_forward_in, self.feed_forward_out)
        if not (is_last and self.ends_at_first_tokens):
            return stages
        return tuple(tuple(replace(m, per="target") for m in stage) for stage in stages)

    @property
    def is_post_norm(self) -> bool:
        """Whether a normalisation follows the embedding and every half of a block: BERT and what descends from it."""
        return self.norm == "layer" and not self.shape.causal

    def targets_per_row(self, length: float) -> float:
        """Return how many positions of a row of plain text the loss counts: its last token predicts nothing; a class is one."""
        return length - 1 if self.head[-1].is_output else 1

    @property
    def is_last_result_needed(self) -> bool:
        """Whether the backward pass needs the result of a block's last product: for a normalisation after it, or to weigh experts."""
        is_normalised = self.num_norms_per_block == 4 or self.is_post_norm
        return is_normalised or self.feed_forward_out[-1].num_experts > 1

    @property
    def num_block_params(self) -> int:
        return sum(m.num_params for m in self.block) + self.num_block_vector_params

    @property
    def num_head_params(self) -> int:
        """Parameters of the head that are not the embedding table."""
        return 0 if self.is_head_tied else sum(m.num_params for m in self.head)

    @property
    def num_params(self) -> int:
        blocks = self.shape.num_layers * self.num_block_params
        return self.num_embedding_params + blocks + self.num_final_vector_params + self.num_head_params


def with_idle_rows(plan: Blueprint, num_used_tokens: int) -> Blueprint:
    """Return a model whose data have some of its tokens alone; of the others' rows of the embedding none trains.

    A tied table has gradients everywhere, and Gemma's embedding, which scales what it looks up, is left as it is.
    """
    if plan.is_head_tied or plan.family.startswith("gemma"):
        return plan
    return replace(plan, num_idle_params=(plan.shape.vocab_size - num_used_tokens) * plan.shape.hidden_size)


def blueprint(config: Mapping[str, Any], task: Task, num_labels: int = 0) -> Blueprint:
    """Return what the model of a `config.json` is made of when it is loaded for a task.

    Raises:
        ShapeError: the family is not known, or a size is missing.
    """
    text = config.get("text_config")
    sizes: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    family = str(sizes.get("model_type"))
    if sizes is not config and config.get("tie_word_embeddings") is not None:
        sizes = {**sizes, "tie_word_embeddings": config["tie_word_embeddings"]}  # the whole says whether its head is its table
    if family not in FAMILIES:
        raise ShapeError(f"config.json: model_type: no formulas for '{family}'; there are some for: {', '.join(sorted(FAMILIES))}")
    plan = FAMILIES[family](sizes, ModelShape.from_config(config), task, num_labels)
    positions = sizes.get("max_position_embeddings") or sizes.get("n_positions")
    return replace(plan, num_positions=positions if isinstance(positions, int) else None)


def _decoder(c: Mapping[str, Any], s: ModelShape, task: Task, num_labels: int) -> Blueprint:
    """Llama and what descends from it."""
    family = c["model_type"]
    width, heads, kv = s.hidden_size, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    bias = bool(c.get("attention_bias", False)) or family == "qwen2"
    out_bias = bool(c.get("attention_bias", False))
    norms = 4 if family in ("gemma2", "gemma3_text") else 2
    head_norms = 2 * s.head_dim if family in ("qwen3", "qwen3_moe", "gemma3_text") else 0
    if family == "phi3":
        attention_in: tuple[Matrix, ...] = (
            Matrix(name="model.layers.*.self_attn.qkv_proj", num_inputs=width, num_outputs=heads + 2 * kv),
        )
    else:
        attention_in = (
            Matrix(name="model.layers.*.self_attn.q_proj", num_inputs=width, num_outputs=heads, has_bias=bias),
            Matrix(name="model.layers.*.self_attn.k_proj", num_inputs=width, num_outputs=kv, has_bias=bias),
            Matrix(name="model.layers.*.self_attn.v_proj", num_inputs=width, num_outputs=kv, has_bias=bias),
        )
    feed_in, feed_out = _feed_forward(c, s)
    tied = task == "causal-lm" and bool(c.get("tie_word_embeddings", family.startswith(("gemma", "smollm3"))))
    outputs = s.vocab_size if task == "causal-lm" else num_labels
    return Blueprint(
        family=family,
        shape=s,
        num_embedding_params=s.vocab_size * width,
        attention_in=attention_in,
        attention_out=(Matrix(name="model.layers.*.self_attn.o_proj", num_inputs=heads, num_outputs=width, has_bias=out_bias),),
        feed_forward_in=feed_in,
        feed_forward_out=feed_out,
        num_block_vector_params=norms * width + head_norms,
        num_final_vector_params=width,
        # `score` is applied at every position, though one a row is used.
        head=(_output(task, width, outputs),),
        is_head_tied=tied,
        is_attention_fused=family != "gemma2",
        norm="rms",
        num_norms_per_block=norms,
        has_head_norms=head_norms > 0,
        # Gate, its activation, the other branch, and their product.
        num_kept_by_activation=4,
        are_logits_capped=task == "causal-lm" and bool(c.get("final_logit_softcapping")),
        is_norm_weighed_in_fp32=family.startswith("gemma"),
        are_experts_weighed_in_fp32=family == "mixtral",
    )


def _feed_forward(c: Mapping[str, Any], s: ModelShape) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    width, inner, family = s.hidden_size, s.intermediate_size, c["model_type"]
    if family in ("mixtral", "qwen3_moe"):
        if c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) != 1:
            raise ShapeError(f"config.json: model_type: no formulas for '{family}' of which some layers have no experts")
        experts = int(c.get("num_local_experts") or c["num_experts"])
        active = int(c["num_experts_per_tok"])
        inner = int(c.get("moe_intermediate_size") or inner)
        stacked: dict[str, Any] = {"num_experts": experts, "num_active": active, "is_module": False}
        router = Matrix(name="model.layers.*.mlp.gate", num_inputs=width, num_outputs=experts, is_module=False)
        return (
            (router, Matrix(name="model.layers.*.mlp.experts.gate_up_proj", num_inputs=width, num_outputs=2 * inner, **stacked)),
            (Matrix(name="model.layers.*.mlp.experts.down_proj", num_inputs=inner, num_outputs=width, **stacked),),
        )
    bias = bool(c.get("mlp_bias", False))
    down = (Matrix(name="model.layers.*.mlp.down_proj", num_inputs=inner, num_outputs=width, has_bias=bias),)
    if family == "phi3":
        return (Matrix(name="model.layers.*.mlp.gate_up_proj", num_inputs=width, num_outputs=2 * inner),), down
    return (
        Matrix(name="model.layers.*.mlp.gate_proj", num_inputs=width, num_outputs=inner, has_bias=bias),
        Matrix(name="model.layers.*.mlp.up_proj", num_inputs=width, num_outputs=inner, has_bias=bias),
    ), down


def _output(task: Task, width: int, outputs: int) -> Matrix:
    if task == "causal-lm":
        return Matrix(name="lm_head", num_inputs=width, num_outputs=outputs, per="target", is_output=True)
    return Matrix(name="score", num_inputs=width, num_outputs=outputs, trains_with_adapter=True)


def _gpt2(c: Mapping[str, Any], s: ModelShape, task: Task, num_labels: int) -> Blueprint:
    width, inner = s.hidden_size, s.intermediate_size
    causal = task == "causal-lm"
    return Blueprint(
        family=c["model_type"],
        shape=s,
        num_embedding_params=(s.vocab_size + int(c.get("n_positions", 1024))) * width,
        attention_in=(Matrix(name="transformer.h.*.attn.c_attn", num_inputs=width, num_outputs=3 * width, has_bias=True),),
        attention_out=(Matrix(name="transformer.h.*.attn.c_proj", num_inputs=width, num_outputs=width, has_bias=True),),
        feed_forward_in=(Matrix(name="transformer.h.*.mlp.c_fc", num_inputs=width, num_outputs=inner, has_bias=True),),
        feed_forward_out=(Matrix(name="transformer.h.*.mlp.c_proj", num_inputs=inner, num_outputs=width, has_bias=True),),
        num_block_vector_params=4 * width,
        num_final_vector_params=2 * width,
        head=(_output(task, width, s.vocab_size if causal else num_labels),),
        is_head_tied=causal and bool(c.get("tie_word_embeddings", True)),
        is_attention_fused=True,
        norm="layer",
        num_norms_per_block=2,
        has_head_norms=False,
        # GELU by its tanh formula, written out: input, cube and scaled sum's tanh, and the two factors of the product.
        num_kept_by_activation=5,
    )


def _encoder(c: Mapping[str, Any], s: ModelShape, task: Task, num_labels: int) -> Blueprint:
    """BERT and what descends from it."""
    if task != "sequence-classification":
        raise ShapeError(f"model.task: {c['model_type']} sees the tokens after a token too; allowed: sequence-classification")
    family = c["model_type"]
    width, inner = s.hidden_size, s.intermediate_size
    distil, is_roberta = family == "distilbert", family in ("roberta", "xlm-roberta", "camembert")
    if distil:
        layer, pooler, classifier = "distilbert.transformer.layer.*", "pre_classifier", "classifier"
        names = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"]
    else:
        layer, pooler, classifier = "bert.encoder.layer.*", "bert.pooler.dense", "classifier"
        if is_roberta:
            layer, pooler, classifier = "roberta.encoder.layer.*", "classifier.dense", "classifier.out_proj"
        names = [f"attention.self.{n}" for n in ("query", "key", "value")]
        names += ["attention.output.dense", "intermediate.dense", "output.dense"]
    q, k, v, out, first, second = (f"{layer}.{name}" for name in names)
    tables = s.vocab_size + int(c.get("max_position_embeddings", 512)) + (0 if distil else int(c.get("type_vocab_size", 2)))
    return Blueprint(
        family=family,
        shape=s,
        num_embedding_params=(tables + 2) * width,
        attention_in=tuple(Matrix(name=n, num_inputs=width, num_outputs=width, has_bias=True) for n in (q, k, v)),
        attention_out=(Matrix(name=out, num_inputs=width, num_outputs=width, has_bias=True),),
        feed_forward_in=(Matrix(name=first, num_inputs=width, num_outputs=inner, has_bias=True),),
        feed_forward_out=(Matrix(name=second, num_inputs=inner, num_outputs=width, has_bias=True),),
        num_block_vector_params=4 * width,
        num_final_vector_params=0,
        head=(
            # BERT's pooler is pretrained; the others' first layer of the head is new, and so trained whole.
            Matrix(
                name=pooler, num_inputs=width, num_outputs=width, has_bias=True, per="target", trains_with_adapter=family != "bert"
            ),
            Matrix(
                name=classifier,
                num_inputs=width,
                num_outputs=num_labels,
                has_bias=True,
                per="target",
                trains_with_adapter=True,
            ),
        ),
        is_head_tied=False,
        is_attention_fused=True,
        norm="layer",
        num_norms_per_block=2,
        has_head_norms=False,
        # GELU's input and output.
        num_kept_by_activation=2,
        # DistilBERT adds the block's input outside of any module that could be told of it.
        ends_at_first_tokens=not distil,
    )


FAMILIES: Mapping[str, Callable[[Mapping[str, Any], ModelShape, Task, int], Blueprint]] = {
    **dict.fromkeys(DECODERS, _decoder),
    "gpt2": _gpt2,
    **dict.fromkeys(ENCODERS, _encoder),
}
