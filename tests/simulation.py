"""Worker groups on a simulated clock, for the tests of placement and for `benchmarks/scale.py`.

Trials stand in line in the order of the search and are handed out while less than a window of them is live, as Ray Tune does it;
`decide` places them, and every rule that the real groups obey is asserted on the way.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from search.placement import Assign, Group, GroupState, Start, Stop, Waiting, decide

START_SECONDS, STOP_SECONDS = 15.0, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedTrial:
    """What a trial asks of the cluster."""

    world_size: int
    seconds: float
    predicted: float | None = None
    """Seconds, as placement is told; None if it is not."""
    arrives: float = 0.0
    """The search proposes it no sooner."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What came of the trials."""

    num_starts: int = 0
    """Groups that were started."""
    num_decisions: int = 0
    decide_seconds: float = 0.0
    """Real seconds in `decide`, all calls together."""
    seconds: float = 0.0
    """Simulated seconds to the end of the last trial."""
    worker_seconds: Counter[str] = field(default_factory=Counter)
    """Simulated: `busy`, `starting`, `stopping`, `idle` while a trial waits, `drained` while none does."""
    started: dict[int, float] = field(default_factory=dict)
    """When each trial began to train, by its place in the line, in the order of the beginnings."""
    submitted: dict[int, float] = field(default_factory=dict)
    """When each trial was handed out."""

    @property
    def most_overtaken(self) -> int:
        """How far ahead of a waiting trial another one was in the line that began before it."""
        last, most = math.inf, 0.0
        for number in reversed(self.started):
            last = min(last, number)
            most = max(most, number - last)
        return int(most)


def packing_bound(capacity: int, trials: Sequence[SimulatedTrial]) -> float:
    """Return the seconds that no schedule beats: all work spread over all workers, and the longest trial."""
    return max(sum(t.world_size * t.seconds for t in trials) / capacity, *(t.seconds for t in trials))


def mixed_trials(num_trials: int, world_sizes: Sequence[int], *, seed: int, error: float | None = None) -> list[SimulatedTrial]:
    """Return trials of a search: half of them take less than a minute, a few of them up to an hour.

    Their seconds are predicted within a factor of 1 + `error`, or not at all.
    """
    rng, errors = random.Random(seed), random.Random(f"errors {seed}")
    trials = []
    for _ in range(num_trials):
        world_size, seconds = rng.choice(world_sizes), min(3600.0, max(3.0, rng.lognormvariate(math.log(60), 1.2)))
        predicted = None if error is None else seconds * (1 + error) ** errors.uniform(-1, 1)
        trials.append(SimulatedTrial(world_size=world_size, seconds=seconds, predicted=predicted))
    return trials


class Simulation:
    """One run of all trials, which are asked for one by one; `on_end` hears of each by its place in the line."""

    def __init__(
        self,
        capacity: int,
        trials: Iterable[SimulatedTrial],
        *,
        window: int,
        on_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._capacity = capacity
        self._trials = iter(trials)
        self._window = window
        self._on_end = on_end
        self._ahead: SimulatedTrial | None = None
        self._handed_out: dict[int, SimulatedTrial] = {}
        self._waiting: dict[int, Waiting] = {}
        self._groups: dict[str, Group] = {}
        self._running: dict[str, int] = {}
        self._ends: dict[str, float] = {}
        self._held: Counter[GroupState] = Counter()
        self._events: list[tuple[float, int, str, str]] = []
        self._num_events = 0
        self._now = 0.0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Return what came of the trials when the last one has ended."""
        self._hand_out()
        self._act()
        while self._waiting or self._running or self._ahead is not None:
            assert self._events, f"deadlock: {len(self._waiting)} wait"
            self._pass_time(self._events[0][0])
            while self._events and self._events[0][0] <= self._now:
                _, _, kind, group_id = heapq.heappop(self._events)
                self._fire(kind, group_id)
            self._hand_out()
            self._act()
        self.outcome.seconds = self._now
        return self.outcome

    def _hand_out(self) -> None:
        while len(self._waiting) + len(self._running) < self._window:
            if self._ahead is None and (trial := next(self._trials, None)) is not None:
                self._ahead = trial
                if trial.arrives > self._now:
                    self._at(trial.arrives, "arrival", "")
            trial = self._ahead
            if trial is None or trial.arrives > self._now:
                return
            self._ahead = None
            number = len(self.outcome.submitted)
            self._waiting[number] = Waiting(job_id=str(number), world_size=trial.world_size, place=number, seconds=trial.predicted)
            self._handed_out[number] = trial
            self.outcome.submitted[number] = self._now

    def _pass_time(self, until: float) -> None:
        spent, seconds = self.outcome.worker_seconds, until - self._now
        for state in (GroupState.STARTING, GroupState.BUSY, GroupState.STOPPING):
            spent[state.value] += self._held[state] * seconds
        unused = self._capacity - sum(self._held[s] for s in (GroupState.STARTING, GroupState.BUSY, GroupState.STOPPING))
        spent["idle" if self._waiting else "drained"] += unused * seconds
        self._now = until

    def _after(self, seconds: float, kind: str, group_id: str) -> None:
        self._at(self._now + seconds, kind, group_id)

    def _at(self, moment: float, kind: str, group_id: str) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (moment, self._num_events, kind, group_id))

    def _fire(self, kind: str, group_id: str) -> None:
        match kind:
            case "gone":
                self._held[GroupState.STOPPING] -= self._groups.pop(group_id).world_size
            case "ready":
                self._set(group_id, GroupState.IDLE)
            case "done":
                self._set(group_id, GroupState.IDLE)
                self._ends.pop(group_id, None)
                self._on_end(self._running.pop(group_id))

    def _set(self, group_id: str, state: GroupState) -> None:
        group = self._groups[group_id]
        self._held[group.state] -= group.world_size
        self._held[state] += group.world_size
        self._groups[group_id] = Group(group_id=group_id, world_size=group.world_size, state=state)

    def _act(self) -> None:
        groups = [
            replace(group, seconds_left=self._ends[name] - self._now) if name in self._ends else group
            for name, group in self._groups.items()
        ]
        began = time.perf_counter()
        actions = decide(capacity=self._capacity, groups=groups, waiting=self._waiting.values())
        self.outcome.decide_seconds += time.perf_counter() - began
        self.outcome.num_decisions += 1
        for action in actions:
            match action:
                case Assign(job_id=job_id, group_id=group_id):
                    number = int(job_id)
                    job, group = self._waiting.pop(number), self._groups[group_id]
                    assert group.state is GroupState.IDLE
                    assert group.world_size == job.world_size
                    self.outcome.started[number] = self._now
                    self._running[group_id] = number
                    self._set(group_id, GroupState.BUSY)
                    trial = self._handed_out.pop(number)
                    if trial.predicted is not None:
                        self._ends[group_id] = self._now + trial.predicted
                    self._after(trial.seconds, "done", group_id)
                case Start(world_size=world_size):
                    self.outcome.num_starts += 1
                    name = f"group-{self.outcome.num_starts:05d}"
                    self._groups[name] = Group(group_id=name, world_size=world_size, state=GroupState.STARTING)
                    self._held[GroupState.STARTING] += world_size
                    self._after(START_SECONDS, "ready", name)
                case Stop(group_id=group_id):
                    assert self._groups[group_id].state is GroupState.IDLE
                    self._set(group_id, GroupState.STOPPING)
                    self._after(STOP_SECONDS, "gone", group_id)
        assert sum(self._held.values()) <= self._capacity
