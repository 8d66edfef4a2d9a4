"""What torch compiles of a trial, and which batches run it: a compilation takes longer than many steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from trainables.batching import Form, Kind

P = ParamSpec("P")
R = TypeVar("R")
# Of the micro batches, the share that fewer of do not repay a compilation of their own.
RARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """For which batches a trial's blocks and its loss are compiled; the others run them as they are written."""

    dynamic: bool | None
    """Whether lengths are variables of the compiled blocks. None: they are compiled for the one form that is covered."""
    _covered: frozenset[Form | tuple[bool, Kind]]

    @classmethod
    def of(cls, forms: Counter[Form]) -> Compilation:
        """Decide, from how often a trial has batches of every form.

        Where nearly all have one form, as packed text has all but the last, that form alone. Else lengths are variables from the
        start, because to compile for the first form and then again for all takes twice as long; torch still compiles padded
        batches, whose attention has a mask, and packed ones apart from others, and those of one row apart from others.
        """
        enough = (1 - RARE) * forms.total()
        usual, count = forms.most_common(1)[0]
        if count >= enough:
            return cls(dynamic=None, _covered=frozenset([usual]))
        kinds: Counter[tuple[bool, Kind]] = Counter()
        for form, count in forms.items():
            kinds[_kind(form)] += count
        return cls(dynamic=True, _covered=frozenset(kind for kind, count in kinds.items() if count >= RARE * forms.total()))

    def covers(self, form: Form) -> bool:
        """Return whether a batch of this form runs what is compiled."""
        return (_kind(form) if self.dynamic else form) in self._covered

    def blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Have torch compile modules when they first run."""
        # What was compiled for earlier trials counts against torch's limit of recompilations, beyond which it compiles no more.
        torch.compiler.reset()
        # An encoder's last block is told apart from the others by its hooks alone (`trainables.first_tokens`).
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # A graph for each kind of block (the first, those computed again, an encoder's last) and of batch: beyond the usual 8 torch
        # would compile nothing more.
        torch._dynamo.config.recompile_limit = 32
        for block in blocks:
            block.compile(dynamic=self.dynamic)

    def function(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return what torch compiles when it first runs; how many targets there are is always a variable of it."""
        return torch.compile(function, dynamic=True)


def _kind(form: Form) -> tuple[bool, Kind]:
    return form.rows == 1, form.kind


def as_written(is_compiled: bool) -> AbstractContextManager[object]:
    """Return what has compiled blocks run as they were written: where something watches them, or they have an unusual batch."""
    # Asking torch costs a second of imports.
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
