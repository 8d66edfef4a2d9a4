"""The directory of one search: what is where, who holds it, and what a resume needs to know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from search.errors import UserError
from search.ledger import Ledger, SearchState, replay
from search.provenance import command_in
from spaces.loading import LoadedSpec, dump_spec, load_spec
from spaces.spec import SearchSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """Paths below `<directory>/<name>`."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def spec_path(self) -> Path:
        return self.root / "spec.yaml"

    @property
    def ledger_path(self) -> Path:
        return self.root / "ledger.jsonl"

    def state(self) -> SearchState:
        """Return what the ledger tells.

        Raises:
            UserError: it is damaged.
        """
        return replay(Ledger(self.ledger_path).events())

    @property
    def report_path(self) -> Path:
        return self.root / "report"

    @property
    def groups_path(self) -> Path:
        return self.root / "groups"

    def trial_path(self, number: int) -> Path:
        """Return where the checkpoints and the final weights of a trial are."""
        return self.root / "trials" / f"{number:04d}"

    def confirmation_path(self, number: int, seed: int) -> Path:
        """Return where a trial is trained again with another seed; nothing is left there once that is recorded."""
        return self.root / "confirmations" / f"{number:04d}-{seed}"

    def export_path(self, number: int, *, is_merged: bool) -> Path:
        """Return where a trial's model is exported to."""
        return self.root / "exports" / (f"{number:04d}-merged" if is_merged else f"{number:04d}")

    @classmethod
    def create(cls, loaded: LoadedSpec) -> Store:
        """Make the directory of a new search and write the resolved spec into it.

        Raises:
            UserError: a search of this name exists already.
        """
        parent = Path(loaded.spec.directory).absolute()
        if loaded.spec.name is not None:
            root = parent / loaded.spec.name
            make_searches(parent)
            root.mkdir(exist_ok=True)
        else:
            root = _new_directory(parent, loaded.path.stem)
        store = cls(root=root)
        # Another one of this name may be about to begin, and has written its spec and no fact yet.
        with store.lock():
            store.check_free()
            # Of one that never came to a trial.
            store.ledger_path.unlink(missing_ok=True)
            store.write_spec(loaded.spec.model_copy(update={"name": store.name}))
        return store

    def check_free(self) -> None:
        """Check that no search with a trial is here.

        Raises:
            UserError: one is.
        """
        if self.state().records:
            parent = self.root.parent
            raise UserError(
                f"a search named '{self.name}' is in {parent} already: go on with `{command_in(parent, 'resume', self.name)}`, "
                "or give this one another name with --set name=..."
            )

    @classmethod
    def open(cls, name: str, directory: Path) -> Store:
        """Find a search by its name below `directory`, or by the path of its own directory.

        Raises:
            UserError: there is none.
        """
        for root in (directory / name, Path(name)):
            if (root / "ledger.jsonl").exists():
                return cls(root=root.absolute())
        there = sorted(p.parent.name for p in directory.glob("*/ledger.jsonl")) if directory.is_dir() else []
        known = ", ".join(there) or "none, and --directory names another place"
        raise UserError(f"no search named '{name}' in {directory.absolute()}; there are: {known}")

    def command(self, *words: str) -> str:
        """Return `paretune WORDS` for the searches beside this one and itself."""
        return command_in(self.root.parent, *words)

    def write_spec(self, spec: SearchSpec) -> None:
        """Write what a resume goes by, whole or not at all."""
        draft = self.spec_path.with_suffix(".draft")
        draft.write_text(dump_spec(spec))
        draft.replace(self.spec_path)

    def load_spec(self) -> LoadedSpec:
        """Return the spec that a resume goes by: as the search was started, or lengthened since."""
        return load_spec(self.spec_path)

    def load_spec_here(self) -> LoadedSpec:
        """Return the spec as if the search had begun where it is now: its directory may have been moved since."""
        loaded = self.load_spec()
        return replace(loaded, spec=loaded.spec.model_copy(update={"directory": str(self.root.parent)}))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other drivers off this search; the operating system lets go of it for a driver that was killed.

        Raises:
            UserError: another driver runs this search.
        """
        try:
            with FileLock(self.root / "driver.lock", blocking=False):
                yield
        except Timeout:
            raise UserError(f"the search '{self.name}' runs already, in another process; wait for it or stop it first") from None


def make_searches(parent: Path) -> None:
    """Make the directory of all searches; a new one is left out of git, and of what `ray job submit --working-dir` uploads."""
    if not parent.exists():
        parent.mkdir(parents=True, exist_ok=True)
        (parent / ".gitignore").write_text("*\n")


def _new_directory(parent: Path, stem: str) -> Path:
    """Make `<stem>-<date>-<number>`, the first that is free."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem)[:40]
    stamp = datetime.now().strftime("%Y%m%d")
    make_searches(parent)
    for number in range(1, 10_000):
        root = parent / f"{stem}-{stamp}-{number}"
        try:
            root.mkdir()
        except FileExistsError:
            continue
        return root
    raise UserError(f"too many searches of {stem} today in {parent}; give this one a name with --set name=...")
