"""What is fine-tuned, and on which rows: the first sections of the user's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictStr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from spaces.domains import Within

Task = Literal["sequence-classification", "causal-lm"]

EMBEDDED = "embedded:"
EMBEDDED_MODELS = ("embedded:all-MiniLM-L6-v2",)
EMBEDDED_DATA = ("embedded:stdlib-docstrings",)
DATA_ROLES = ("train", "evaluation", "test")
# How chat templates are named that are files.
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
# The columns that a format has.
FORMAT_COLUMNS = (("text", "label"), ("prompt", "completion"), ("messages",))

_SAFE_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_HUB_DATA = re.compile(r"hf:[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?")


def _not_empty(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "empty", {"allowed": "a text that is not empty"})
    return value


def _safe_name(value: str) -> str:
    # `.` and `..` are directories that exist already.
    if not _SAFE_NAME.fullmatch(value) or not value.strip("."):
        allowed = {"allowed": "1 to 64 letters, digits, '.', '_' and '-'"}
        raise PydanticCustomError("unsafe_name", "not a safe name for a directory", allowed)
    return value


def _import_path(value: str) -> str:
    if not _IMPORT_PATH.fullmatch(value):
        raise PydanticCustomError("import_path", "not an import path", {"allowed": "module:function, as my_scores:weighted_f1"})
    return value


def _known_embedded_model(value: str) -> str:
    return _known_embedded(value, EMBEDDED_MODELS)


def _known_data(value: str) -> str:
    if value.startswith("hf:") and not _HUB_DATA.fullmatch(value):
        allowed = {"allowed": "hf:org/name, hf:org/name:config, hf:org/name@revision"}
        raise PydanticCustomError("hub_data", "not the name of a hub data set", allowed)
    return _known_embedded(value, EMBEDDED_DATA)


def _known_embedded(value: str, known: tuple[str, ...]) -> str:
    if value.startswith(EMBEDDED) and value not in known:
        allowed = {"allowed": ", ".join(known), "names": list(known)}
        raise PydanticCustomError("embedded", "not an embedded one", allowed)
    return value


Text = Annotated[StrictStr, AfterValidator(_not_empty)]
SafeName = Annotated[StrictStr, AfterValidator(_safe_name)]
ModelName = Annotated[Text, AfterValidator(_known_embedded_model)]
DataName = Annotated[Text, AfterValidator(_known_data)]
ImportPath = Annotated[StrictStr, AfterValidator(_import_path)]
AtLeastOne = Annotated[int, Within(ge=1, le=1_000_000)]
AtLeastZero = Annotated[int, Within(ge=0, le=1_000_000)]


class Section(BaseModel):
    """A section of the file: no key but the known ones, and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSpec(Section):
    """The model that is fine-tuned."""

    name: ModelName
    """A hub name, a local directory, or `embedded:all-MiniLM-L6-v2`."""
    task: Task
    """What the model learns: labels of rows, or the next token."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    max_length: Annotated[int, Within(ge=8, le=131_072)] = 128
    """Tokens per row. Longer rows are cut at the end; with a prompt first at its beginning, down to half of these."""


class DomainSpec(Section):
    """One of several domains of data; a language model's may differ in format: plain text, prompts with completions, chats."""

    train: DataName
    """As `data.train`."""
    evaluation: DataName | None = None
    """As `data.evaluation`."""
    test: DataName | None = None
    """As `data.test`."""
    weight: Annotated[float, Within(gt=0, le=1_000_000)] | None = None
    """How many of the trained rows are of this domain, relative to the other domains' weights. Without weights every row is trained
    as often as any other."""
    text: Text | None = None
    """As `data.text`, for this domain. A domain that names a column has those of `data` for the others of the same format alone."""
    label: Text | None = None
    """As `data.label`, for this domain."""
    prompt: Text | None = None
    """As `data.prompt`, for this domain."""
    completion: Text | None = None
    """As `data.completion`, for this domain."""
    messages: Text | None = None
    """As `data.messages`, for this domain."""


class DataSpec(Section):
    """The rows to train and to evaluate on. Columns are found by their names unless they are given."""

    train: DataName | None = None
    """A csv, tsv, jsonl, json, parquet or txt file, `hf:org/name[:config][@revision]`, `embedded:stdlib-docstrings`."""
    evaluation: DataName | None = None
    """Rows that every trial is evaluated on; without it, a part of the training rows is held out."""
    test: DataName | None = None
    """Rows that the search never sees; members of the front are scored on them at the end, and `paretune confirm` scores on them."""
    domains: dict[SafeName, DomainSpec] | None = None
    """In the place of `train`, `evaluation` and `test`: several domains by their names, each with these keys and a `weight`. The
    accuracy on the rows of each is reported as `accuracy.NAME`, and may be an objective."""
    holdout: Annotated[float, Within(gt=0, le=0.5)] = 0.1
    """Share of the training rows that is held out when there is no evaluation file; rows that are alike, all or none of them."""
    text: Text | None = None
    """Column of the text; by default `text`, `content`, `document`, `sentence`, `review` or `utterance`, and where it is classified
    `question`, `query` or `title` too. For a language model each row is a document with windows of its own, and a txt file is one
    document."""
    label: Text | None = None
    """Column of the label (classification); by default `label`, `category`, `intent`, `class`, `target`, `topic` or `sentiment`."""
    prompt: Text | None = None
    """Column of the prompt (causal-lm); by default `prompt`, `instruction`, `question`, `query` or `input`. A line break is put
    between it and the completion, and an instruction's `input` between both; so is, where no column is named, the `context` of an
    instruction or a question."""
    completion: Text | None = None
    """Column of the completion, the only part that the loss counts (causal-lm); by default `completion`, `output`, `answer` or
    `response`."""
    messages: Text | None = None
    """Column of the chat messages (causal-lm); by default `messages` or `conversations`. The assistant's answers are learned; where
    the model's template renders a turn otherwise once others follow, as Qwen 3's does, the last of them."""
    chat_template: Text | None = None
    """Jinja file of the template that chats are rendered in, or a model whose tokenizer has one; by default the model's own, which
    base models seldom have. It must end answers with a token that the model knows, such as `{{ eos_token }}`."""
    answer_pattern: Text | None = None
    """Regular expression whose first group is the answer in a completion; exact_match compares it."""
    exact_match_rows: AtLeastZero = 64
    """Evaluation rows, and as many test rows, that are completed greedily for exact_match and for `metric`; 0 turns it off."""
    metric: ImportPath | None = None
    """`module:function` of a score of your own, of the working directory or installed: it takes two lists of texts, predictions
    (labels, or completions) and references, and returns a number, reported as `custom`. As an objective it is better the higher,
    from 0 or its `reference` on."""

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            num_groups = re.compile(pattern or "()").groups
        except re.error as error:
            context = {"error": str(error), "allowed": "a regular expression of Python"}
            raise PydanticCustomError("pattern", "not a regular expression ({error})", context) from error
        if not num_groups:
            context = {"allowed": "a regular expression whose first group is the answer", "nearest": f"({pattern})"}
            raise PydanticCustomError("no_group", "the expression has no group", context)
        return pattern

    @field_validator("domains")
    @classmethod
    def _weights_of_all(cls, domains: dict[str, DomainSpec] | None) -> dict[str, DomainSpec] | None:
        if domains is not None and not domains:
            raise PydanticCustomError("no_domain", "no domain", {"allowed": "at least one, as {news: {train: news.csv}}"})
        without = [name for name, domain in (domains or {}).items() if domain.weight is None]
        if without and len(without) < len(domains or {}):
            context = {"name": without[0], "allowed": "a weight for every domain, or for none"}
            raise PydanticCustomError("weights", "'{name}' has no weight, and others have", context)
        return domains

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.domains is None and self.train is None:
            raise PydanticCustomError("no_data", "no rows to train on", {"allowed": "domains: {NAME: {train: FILE}}"})
        beside = [role for role in DATA_ROLES if getattr(self, role) is not None]
        if self.domains is not None and beside:
            context = {"role": beside[0], "allowed": f"domains, each with its own {beside[0]}"}
            raise PydanticCustomError("two_sources", "{role} stands beside domains", context)
        return self

    @property
    def sources(self) -> Mapping[str, DomainSpec]:
        """Where the rows are and how their columns are named, by the domain's name; without domains under the empty name."""
        if self.domains is not None:
            return {name: domain.model_copy(update=self._shared_columns(domain)) for name, domain in self.domains.items()}
        assert self.train is not None  # validated
        own = DomainSpec(train=self.train, evaluation=self.evaluation, test=self.test)
        return {"": own.model_copy(update=self._shared_columns(own))}

    def _shared_columns(self, domain: DomainSpec) -> dict[str, str | None]:
        """Return the columns that a domain does not name itself: of the formats that it names any column of, else of all."""
        named = [columns for columns in FORMAT_COLUMNS if any(getattr(domain, column) for column in columns)]
        wanted = [column for columns in named or FORMAT_COLUMNS for column in columns]
        return {column: getattr(self, column) for column in wanted if getattr(domain, column) is None}

    @property
    def files(self) -> dict[str, str]:
        """All files and hub data sets by the dotted key that names them."""
        found: dict[str, str] = {}
        for name, source in self.sources.items():
            prefix = f"data.domains.{name}" if name else "data"
            found |= {f"{prefix}.{role}": file for role in DATA_ROLES if (file := getattr(source, role)) is not None}
        return found

    @property
    def name(self) -> str:
        """What people call the data: the file, or the domains."""
        return self.train or ", ".join(self.domains or {})
