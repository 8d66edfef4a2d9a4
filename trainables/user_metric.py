"""A score of the user's own, named by its import path."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import cloudpickle

from trainables.formats import DataError
from trainables.report import TrialError

Score = Callable[[Sequence[str], Sequence[str]], float]
"""Takes predictions and references, as many of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserMetric:
    """The function, and how it is named; it travels to workers that cannot import it."""

    path: str
    """`module:function`"""
    pickled: bytes

    @classmethod
    def load(cls, path: str) -> UserMetric:
        """Import the function, from the working directory too.

        A module of the working directory travels with its own code; what it imports must be installed where the workers are.

        Raises:
            DataError: there is no such function.
        """
        module_name, _, name = path.partition(":")
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # a module of the user's may raise anything
            raise DataError(f"data.metric: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(here)
        function = getattr(module, name, None)
        if not callable(function):
            known = ", ".join(sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_")))
            raise DataError(f"data.metric: {module_name} has no function '{name}'; it has: {known or 'none'}")
        if _is_local(module):
            cloudpickle.register_pickle_by_value(module)
        return cls(path=path, pickled=cloudpickle.dumps(function))

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        """Return the score.

        Raises:
            TrialError: the function failed, or gave no finite number.
        """
        score = cast("Score", cloudpickle.loads(self.pickled))
        try:
            value = float(score(list(predictions), list(references)))
        except Exception as error:  # a function of the user's may raise anything
            raise TrialError(f"data.metric: {self.path} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise TrialError(f"data.metric: {self.path} gave {value}, which is no finite number")
        return value


def _is_local(module: ModuleType) -> bool:
    """Return whether a module is of the working directory alone: what is installed, workers import themselves."""
    path = Path(module.__file__ or "/")
    return path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts
