"""What a worker does with one job, without Ray: where it reports, how it leaves, and what it leaves behind."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import make_model, make_rows

from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec
from spaces.metrics import METRICS
from spaces.space import SpaceSpec
from trainables.checkpoint import Checkpoint, CheckpointStore
from trainables.data import TaskData
from trainables.job import HERE, Ask, Job, Task
from trainables.loop import Command
from trainables.mesh import World
from trainables.model import BaseModel
from trainables.preparation import prepare
from trainables.report import DiskFull, OutOfMemory, TrialError, TrialReport
from trainables.worker import _Control, _execute, _failure, _run_job, check_shared

WORLD = World(rank=0, world_size=1, device=torch.device("cpu"), control_group=None, node_id="here")
TASK = Task(model_name="", model_revision=None, task="sequence-classification", exact_match_rows=0, precisions=("fp32",), data=[])


@dataclass
class Inbox:
    """The dispatcher as a worker sees it: it asks for something after so many steps."""

    ask: Ask | None = None
    after: int = 0
    reports: list[TrialReport] = field(default_factory=list)

    def watch(self) -> Callable[[], Ask | None]:
        answers: Iterator[Ask | None] = iter([None] * self.after)
        return lambda: next(answers, self.ask)

    def report(self, report: TrialReport) -> None:
        self.reports.append(report)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskData, BaseModel]:
    directory = tmp_path_factory.mktemp("worker")
    model = ModelSpec(name=str(make_model(directory / "model")), task="sequence-classification", max_length=32)
    data = prepare(model, DataSpec(train=str(make_rows(directory / "train.csv", num_rows=80))))
    return data, BaseModel.load(model.name, None, model.task, data.label_names)


def work(parts: tuple[TaskData, BaseModel], directory: Path, inbox: Inbox, *, epochs: int = 1, **changes: Any) -> dict[str, Any]:
    """Train 18 steps an epoch."""
    params = SpaceSpec(global_batch_size=4, dataset_fraction=1.0, epochs=epochs).first()
    config = TrialConfig.from_params(params).to_dict()
    job = Job(job_id="j", kind="train", config=config, directory=str(directory), **changes)
    return _execute(job, task=TASK, data=parts[0], base=parts[1], world=WORLD, inbox=cast(Any, inbox))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, [2, 6, 18]), ({"rungs": (0.25, 0.5)}, [4, 9, 18]), ({"rungs": ()}, [18])],
)
def test_a_trial_reports_at_the_rungs_of_its_job(parts: Any, tmp_path: Path, changes: dict[str, Any], steps: list[int]) -> None:
    inbox = Inbox()
    assert work(parts, tmp_path / "t", inbox, **changes) == {"state": "complete"}
    assert [r.step for r in inbox.reports] == steps
    final = inbox.reports[-1]
    assert [r.final for r in inbox.reports] == [False] * (len(steps) - 1) + [True]
    for earlier in inbox.reports[:-1]:
        assert set(earlier.metrics) == {m for m in final.metrics if METRICS[m].is_interim}
    assert not all(METRICS[m].is_interim for m in final.metrics)


@pytest.mark.parametrize(("epochs", "steps"), [(1, [18]), (3, [6, 18, 54])])
def test_a_point_of_the_curve_that_decides_nothing_costs_at_most_a_fiftieth_of_the_trial(
    parts: Any, tmp_path: Path, epochs: int, steps: list[int]
) -> None:
    inbox = Inbox()
    # 8 evaluation rows cost as much as 3 that are trained: less than a fiftieth of 216, more than one of 72.
    assert work(parts, tmp_path / "t", inbox, epochs=epochs, is_judged=False) == {"state": "complete"}
    assert [r.step for r in inbox.reports] == steps


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation for Memory Management"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
    ],
)
def test_what_torch_says_of_a_full_device_is_out_of_memory(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def forward(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr("trainables.loss.TrainingLoss.__call__", forward)
    with pytest.raises(OutOfMemory) as caught:
        work(parts, tmp_path / "t", Inbox())
    assert str(caught.value) == str(error).splitlines()[0]
    assert (found := _failure(caught.value, False))["kind"] == "out_of_memory", found


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_refers_to_itself_does_not_stay_beside_that_of_the_next_job(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """As one does that FSDP2 shards."""
    made: list[weakref.ref[torch.nn.Module]] = []

    def execute(*_: Any, **__: Any) -> dict[str, Any]:
        module = torch.nn.Linear(2, 2)
        module.itself = [module]
        made.append(weakref.ref(module))
        if fails:
            raise OutOfMemory("full")
        return {"state": "complete"}

    monkeypatch.setattr("trainables.worker._execute", execute)
    outcomes: list[dict[str, Any]] = []
    job = Job(job_id="j", kind="train", config={}, directory="")
    gc.disable()
    try:
        _run_job(
            job,
            task=TASK,
            data=cast(Any, None),
            base=cast(Any, None),
            world=WORLD,
            inbox=cast(Any, SimpleNamespace(finish=outcomes.append)),
        )
    finally:
        gc.enable()
    assert [outcome["state"] for outcome in outcomes] == ["failed" if fails else "complete"]
    assert made[0]() is None


@pytest.mark.parametrize(
    ("error", "restarts"), [(TrialError("no such adapter"), False), (OutOfMemory("full"), True), (DiskFull("full"), True)]
)
def test_what_one_rank_alone_meets_restarts_its_group(monkeypatch: pytest.MonkeyPatch, error: TrialError, restarts: bool) -> None:
    """The others wait for it in a collective."""

    def execute(*_: Any, **__: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr("trainables.worker._execute", execute)
    outcomes: list[dict[str, Any]] = []
    job = Job(job_id="j", kind="train", config={}, directory="")
    known: dict[str, Any] = {"task": TASK, "data": None, "base": None, "world": replace(WORLD, world_size=2)}
    with pytest.raises(type(error)) if restarts else nullcontext():
        _run_job(job, **known, inbox=cast(Any, SimpleNamespace(finish=outcomes.append)))
    assert [(outcome["kind"], bool(outcome.get("group_restarts"))) for outcome in outcomes] == [(error.kind, restarts)]


def test_other_ranks_wait_until_a_checkpoint_is_written(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("trainables.worker.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("trainables.loop.SAVED_BYTES_PER_SECOND", math.inf)
    monkeypatch.setattr(World, "gather", lambda *_: done.append("meet") or [None])
    monkeypatch.setattr(CheckpointStore, "save", lambda *_: done.append("write"))
    assert work(parts, tmp_path, Inbox(ask=Ask.STOP, after=3)) == {"state": "stopped"}
    written = [i for i, what in enumerate(done) if what == "write"]
    assert written
    assert all(done[i + 1] == "meet" for i in written)


def test_a_stopped_trial_takes_its_files_along_and_a_suspended_one_leaves_them(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.worker.CHECKPOINT_SECONDS", -1.0)  # at every step
    monkeypatch.setattr("trainables.worker.CHECKPOINT_SHARE", math.inf)
    stopped, suspended = Inbox(ask=Ask.STOP, after=4), Inbox(ask=Ask.SUSPEND, after=4)
    assert work(parts, tmp_path / "stopped", stopped) == {"state": "stopped"}
    assert [r.step for r in stopped.reports] == [2]
    assert not (tmp_path / "stopped").exists()
    assert work(parts, tmp_path / "suspended", suspended) == {"state": "stopped"}
    assert sorted(p.name for p in (tmp_path / "suspended").iterdir()) == ["step-00000004", "step-00000005"]


def test_a_trial_that_was_cut_off_at_a_rung_reports_there_when_it_goes_on(parts: Any, tmp_path: Path) -> None:
    suspended, resumed = Inbox(ask=Ask.SUSPEND, after=1), Inbox()
    assert work(parts, tmp_path / "t", suspended) == {"state": "stopped"}
    assert not suspended.reports
    assert work(parts, tmp_path / "t", resumed) == {"state": "complete"}
    assert [r.step for r in resumed.reports] == [2, 6, 18]
    whole = Inbox()
    work(parts, tmp_path / "whole", whole)
    assert [r.metrics["eval_loss"] for r in resumed.reports] == [r.metrics["eval_loss"] for r in whole.reports]


@pytest.mark.parametrize("save_seconds", [0.1, 20.0, 70.0, 300.0])
def test_checkpoints_that_take_long_to_write_take_at_most_a_tenth_of_the_time(
    monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    clock, num_saves = [0.0], 0
    monkeypatch.setattr("trainables.worker.time", SimpleNamespace(monotonic=lambda: clock[0]))
    control = _Control(lambda: None, WORLD, cast(Any, SimpleNamespace(save_seconds=save_seconds)))
    for _ in range(2000):
        clock[0] += 5
        if control(False) is Command.SAVE:
            num_saves += 1
            clock[0] += save_seconds
    assert num_saves > 0
    assert num_saves * save_seconds <= 0.11 * 5 * 2000
    assert num_saves >= 0.9 * 5 * 2000 / max(65, 10 * save_seconds), "nor is more lost than that asks for"


@pytest.mark.parametrize(("write_seconds", "saved"), [(0.0, [2, 6, 9]), (1e9, [2, 9])])
def test_what_takes_long_to_write_is_not_written_at_every_rung(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_seconds: float, saved: list[int]
) -> None:
    steps, clock = [], [0.0]

    def save(_: CheckpointStore, step: int, __: Checkpoint) -> None:
        steps.append(step)
        clock[0] += write_seconds

    monkeypatch.setattr(CheckpointStore, "save", save)
    # 13 s a step, with rungs at the second and the sixth; five are more than a minute.
    seconds = itertools.count(step=13)
    monkeypatch.setattr("trainables.worker.time", SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=perf_counter))
    monkeypatch.setattr("trainables.loop.time.perf_counter", lambda: perf_counter() + clock[0])
    assert work(parts, tmp_path / "t", Inbox(ask=Ask.SUSPEND, after=8)) == {"state": "stopped"}
    assert steps == saved


def test_a_node_that_does_not_see_what_the_driver_writes_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} is not on node .*: `directory` must name one that all nodes share$"):
        check_shared(tmp_path / "groups")
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / HERE).touch()
    check_shared(tmp_path / "groups")
