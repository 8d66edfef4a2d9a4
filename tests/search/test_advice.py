"""Which trial of a front is the one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from search.advice import best_in, doubts, knee, recommendation, recommended, within
from search.record import Confirmation, TrialRecord, TrialState
from spaces.spec import Objective

ACCURACY = Objective(metric="accuracy", direction="maximize", reference=0.0)
SECONDS = Objective(metric="train_seconds", direction="minimize", reference=100.0)
MEMORY = Objective(metric="peak_memory_bytes", direction="minimize", reference=10.0)
TWO = (ACCURACY, SECONDS)
THREE = (ACCURACY, SECONDS, MEMORY)


def trial(number: int, values: Sequence[float], *seeds: Sequence[float]) -> TrialRecord:
    """Return a complete trial, and what each further seed had."""
    names = ("accuracy", "train_seconds", "peak_memory_bytes")
    done = [
        Confirmation(
            seed=seed, state=TrialState.COMPLETE, values=dict(zip(names, found, strict=False)), started_at=0.0, finished_at=1.0
        )
        for seed, found in enumerate(seeds, 1)
    ]
    known = dict(zip(names, values, strict=False))
    return TrialRecord(number=number, state=TrialState.COMPLETE, params={}, values=known, confirmations=done)


def test_the_knee_is_furthest_from_the_chord() -> None:
    members = [trial(n, v) for n, v in enumerate([(0.1, 1.0), (0.8, 10.0), (0.85, 40.0), (0.9, 101.0)])]
    found = knee(members, TWO)
    assert found is not None
    # Distance of every point to the line through the scaled ends, the long way round.
    scaled = np.array([[(t.values["train_seconds"] - 1) / 100, (t.values["accuracy"] - 0.1) / 0.8] for t in members])
    start, end = scaled[0], scaled[-1]
    distances = [abs(np.linalg.det([end - start, point - start])) / np.linalg.norm(end - start) for point in scaled]
    assert found.number == int(np.argmax(distances)) == 1


@pytest.mark.parametrize(("values", "number"), [([(0.5, 1.0)], 0), ([(0.5, 1.0), (0.9, 2.0)], 0), ([(0.5, 1.0)] * 4, 0)])
def test_the_knee_of_a_front_without_one_is_its_first(values: list[tuple[float, float]], number: int) -> None:
    found = knee([trial(n, v) for n, v in enumerate(values)], TWO)
    assert found is not None
    assert found.number == number


def test_the_knee_of_three_objectives_is_the_balanced_member() -> None:
    members = [trial(n, v) for n, v in enumerate([(1.0, 9.0, 9.0), (0.1, 1.0, 9.0), (0.1, 9.0, 1.0), (0.8, 2.0, 2.0)])]
    found = knee(members, THREE)
    assert found is not None
    assert found.number == 3


def test_there_is_no_knee_of_nothing() -> None:
    assert knee([], TWO) is None


def test_the_knee_is_that_of_what_further_seeds_say_where_they_say_it_of_all() -> None:
    """The search's own seed of trial 1 was lucky: by two further ones trial 2 is faster and better."""
    members = [
        trial(0, (0.1, 1.0), (0.1, 1.0), (0.1, 1.0)),
        trial(1, (0.8, 10.0), (0.4, 30.0), (0.5, 30.0)),
        trial(2, (0.85, 40.0), (0.8, 12.0), (0.9, 12.0)),
        trial(3, (0.9, 101.0), (0.86, 101.0), (0.88, 101.0)),
        trial(4, (0.95, 150.0), (0.7, 150.0), (0.7, 150.0)),
    ]
    found = knee(members, TWO)
    assert found is not None
    assert found.number == 2
    text = recommendation(members, (ACCURACY, replace(SECONDS, reference=120.0, is_limit=True)), "banking")
    assert text.startswith("Take trial 3 of banking: accuracy 0.87"), "trial 4, the best of the search, is not by its further seeds"
    assert "; the knee of the 4 within 120 s is trial 2, accuracy 0.85" in text
    of_some = [*members[:4], trial(4, (0.95, 150.0))]
    found = knee(of_some, TWO)
    assert found is not None
    assert found.number == 1, "values of further seeds are not held against those of a search"


def test_of_two_members_the_knee_is_never_one_that_the_other_beats() -> None:
    found = knee([trial(0, (0.8, 10.0), (0.4, 20.0)), trial(1, (0.9, 20.0), (0.9, 15.0))], TWO)
    assert found is not None
    assert found.number == 1


def test_what_is_within_all_limits_is_kept_what_is_within_all_limits() -> None:
    members = [trial(n, v) for n, v in enumerate([(0.7, 10.0), (0.85, 60.0), (0.9, 61.0)])]
    assert [t.number for t in within(members, {"train_seconds": ("<=", 60)})] == [0, 1]
    assert [t.number for t in within(members, {"train_seconds": ("<=", 60), "accuracy": (">=", 0.85)})] == [1]
    assert within(members, {"mfu": (">=", 0.0)}) == []
    assert within(members, {}) == members
    with pytest.raises(KeyError):
        within(members, {"accuracy": ("==", 0.7)})


def test_limits_are_held_against_what_further_seeds_say_where_they_say_it_of_all() -> None:
    members = [trial(0, (0.8, 4.5), (0.7, 4.1)), trial(1, (0.85, 5.3), (0.8, 4.0))]
    assert [r.number for r in within(members, {"train_seconds": ("<=", 4.6)})] == [0, 1]
    assert best_in(members, TWO, ACCURACY).number == 1
    unsure = [*members, trial(2, (0.9, 9.0))]
    assert [r.number for r in within(unsure, {"train_seconds": ("<=", 4.6)})] == [0]


def test_where_some_have_further_seeds_the_sentence_compares_what_the_choice_was_made_by() -> None:
    members = [trial(0, (0.5, 1.0)), trial(1, (0.8, 4.5)), trial(2, (0.85, 5.3), (0.84, 4.0), (0.86, 4.0))]
    text = recommendation(members, TWO, "banking")
    assert "Take trial 2 of banking: accuracy 0.85 at train_seconds 5.3 s, the best on the front;" in text
    assert "the knee of the 3 is trial 1, accuracy 0.8 at train_seconds 4.5 s, 85% of that" in text


def test_the_best_within_the_references_is_recommended_and_what_is_worth_nothing_is_not() -> None:
    members = [trial(n, v) for n, v in enumerate([(0.2, 5.0), (0.5, 30.0), (0.6, 100.0), (0.7, 140.0)])]
    limited = (ACCURACY, replace(SECONDS, is_limit=True))
    found = recommended(members, limited)
    assert found is not None
    assert found.number == 2, "which takes just as long as there is time"
    assert recommended(members, TWO) is members[3], "where the user gave no limit there is none"
    text = recommendation(members, limited, "banking")
    assert text.startswith(
        "Take trial 2 of banking: accuracy 0.6 at train_seconds 100 s, the best on the front within 100 s; the knee"
    )
    for worthless in ([trial(0, (0.0, 5.0))], [trial(0, (0.9, 101.0))]):
        assert recommended(worthless, limited) is None
        assert recommendation(worthless, limited, "banking").startswith(
            "Nothing to recommend: no trial of banking is better than accuracy 0 and train_seconds 100 s; the best is trial 0, "
        )
    loss = Objective(metric="accuracy", direction="minimize", reference=None)
    assert recommended(members, (loss, SECONDS)) is members[0], "where no reference is known all counts"
    three = (ACCURACY, SECONDS, replace(MEMORY, reference=3.0 * 2**30, is_limit=True))
    rich = [trial(n, v) for n, v in enumerate([(0.5, 30.0, 2.0 * 2**30), (0.6, 40.0, 4.0 * 2**30)])]
    assert recommended(rich, three) is rich[0]
    assert recommendation(rich, three, "banking").endswith("30 s, the best on the front within 3.00 GiB.")
    bent = [trial(n, v) for n, v in enumerate([(0.1, 1.0), (0.5, 10.0), (0.6, 60.0), (0.9, 101.0), (0.95, 900.0)])]
    assert "the knee of the 3 within 100 s is trial 1," in recommendation(bent, limited, "banking"), "of all it would be trial 3"


def test_trials_whose_steps_alone_were_timed_are_named_in_one_line() -> None:
    trained, one, other = (trial(n, (0.5, 9.0)) for n in (3, 5, 7))
    one, other = replace(one, source=3), replace(other, source=3)
    assert doubts([trained]) == []
    assert doubts([trained, one]) == ["trial 5 is the recipe of trial 3 under another layout, of which some steps were timed"]
    assert doubts([trained, one, other]) == [
        "recipes of other trials under another layout, of which some steps were timed: 5 of 3, 7 of 3"
    ]
