"""The definitions, against their words; and the choice."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from fapm import UserError
from fapm.choosing.choice import Choice, by_name, check_choice, choose, front
from fapm.choosing.skills import Measure, Point, doubts, points, read_skills, remarks


def test_retained_and_forgetting_are_the_field_s():
    skills = {
        "base": {"new": Measure(0.1), "old": Measure(0.8)},
        "finetuned": {"new": Measure(0.9), "old": Measure(0.5)},
        "a": {"new": Measure(0.81), "old": Measure(0.76)},
    }
    found = points(skills, "base", "finetuned")
    assert found["a"].retained == Measure(pytest.approx(0.9))
    assert found["a"].forgetting == Measure(pytest.approx(0.05))  # (0.8 − 0.76) / 0.8
    assert (found["base"].forgetting, found["finetuned"].retained) == (Measure(0.0), Measure(1.0))
    assert found["finetuned"].forgetting == Measure(pytest.approx(0.375))


def test_what_is_missing_is_not_said():
    found = points({"a": {"new": Measure(0.5)}, "base": {"old": Measure(0.0)}}, "base", "finetuned")
    assert found["a"] == Point("a", Measure(0.5), None, None, None)
    assert found["base"].forgetting is None  # of no old skill nothing can be forgotten


def test_standard_errors_are_those_of_the_ratio():
    """Against drawing both skills many times."""
    chance = random.Random(0)
    new, whole = Measure(0.6, 0.02), Measure(0.8, 0.01)
    drawn = [chance.gauss(new.value, new.stderr) / chance.gauss(whole.value, whole.stderr) for _ in range(20_000)]
    ratio = new.over(whole)
    assert ratio.value == pytest.approx(0.75)
    assert ratio.stderr == pytest.approx(statistics.stdev(drawn), rel=0.05)


def test_what_an_evaluation_may_say():
    assert read_skills({"new": 0.5}) == {"new": Measure(0.5)}
    assert read_skills({"new": 1, "old": None, "seconds": 3}) == {"new": Measure(1.0)}
    assert read_skills({"old": {"value": 0.5, "stderr": 0.1}}) == {"old": Measure(0.5, 0.1)}
    loss = read_skills({"old": {"loss": 2.0, "stderr": 0.1}})["old"]
    assert loss == Measure(pytest.approx(math.exp(-2)), pytest.approx(0.1 * math.exp(-2)), 2.0)
    two = read_skills({"old": {"a": {"loss": 1.0}, "b": {"loss": 3.0}}})["old"]
    assert two == Measure(pytest.approx((math.exp(-1) + math.exp(-3)) / 2), None, 2.0)
    several = read_skills(
        {"old": {"mmlu": {"value": 0.4, "stderr": 0.03}, "hellaswag": {"value": 0.6, "stderr": 0.04}}}
    )
    assert several["old"] == Measure(pytest.approx(0.5), pytest.approx(0.025))


@pytest.mark.parametrize(
    "said",
    [3, None, [], {}, {"acc": 0.3}, {"new": "0.3"}, {"new": True}, {"new": math.nan}, {"new": {}}, {"old": {"a": []}},
     {"new": {"value": 0.3, "stderr": "x"}}, {"new": {"value": math.inf}}],
)  # fmt: skip
def test_what_it_may_not_say(said):
    with pytest.raises(UserError):
        read_skills(said)


def point(name: str, retained: float, forgetting: float, stderr: float | None = None) -> Point:
    return Point(name, None, None, Measure(retained, stderr), Measure(forgetting, stderr))


def among(*given: Point) -> dict[str, Point]:
    return {one.name: one for one in given}


FOUR = among(point("a", 0.90, 0.01), point("b", 0.96, 0.02), point("c", 0.99, 0.10), point("d", 0.95, 0.30))


def test_the_least_forgetting_above_a_floor():
    assert choose("retained>=0.95", FOUR).name == "b"
    assert choose(" retained >= 97% ", FOUR).name == "c"
    assert choose("retained>=0", FOUR).name == "a"
    assert choose("forgetting<=0.02", FOUR).name == "b"
    assert choose("forgetting<=0.5", FOUR).name == "c"
    with pytest.raises(UserError, match=r"no candidate is like that; c comes closest, 0\.99"):
        choose("retained>=0.995", FOUR)


def test_none_is_called_better_within_the_errors():
    close = among(point("a", 0.90, 0.010, 0.005), point("b", 0.97, 0.014, 0.005), point("c", 0.99, 0.10, 0.005))
    found = choose("retained>=0.85", close)
    assert (found.name, found.alike) == ("b", ("a",))  # forgets no more than a as far as can be told, and retains more
    sharp = among(*(point(p.name, p.retained.value, p.forgetting.value, 0.0001) for p in close.values()))
    why = "it has the least forgetting of 3 of 3 candidates with retained>=0.85"
    assert choose("retained>=0.85", sharp) == Choice("a", why)


def test_the_front_and_its_knee():
    assert [p.name for p in front(FOUR)] == ["a", "b", "c"]
    assert choose("knee", FOUR).name == "b"
    straight = among(point("a", 0.5, 0.0), point("b", 0.745, 0.01), point("c", 0.99, 0.02))
    assert choose("knee", straight).name == "c"  # nearest to everything kept and nothing forgotten
    assert by_name("c", 4, FOUR) == Choice("c", "it was chosen by name, out of 4 candidates")


def test_a_knee_wants_three_that_the_errors_tell_apart():
    for found in (among(*list(FOUR.values())[:2]), {n: point(n, p.retained.value, 0.1, 0.05) for n, p in FOUR.items()}):
        with pytest.raises(UserError, match=r"the errors tell [12] of [24] candidate\(s\) apart, and a knee wants 3"):
            choose("knee", found)


def test_a_choice_that_gives_the_skill_away_says_so():
    poor = among(point("a", 0.3, 0.01), point("b", 0.2, 0.02), point("c", 0.45, 0.3))
    for how in ("retained>=0.1", "forgetting<=0.02", "knee"):
        assert "; it retains less than half of the new skill, " in choose(how, poor).why
    assert by_name("b", 3, poor).why.endswith("less than half of the new skill, 20.0%")


@pytest.mark.parametrize(
    ("base", "finetuned", "said"),
    [
        ((0.1, 0.8), (0.9, 0.5), []),
        ((0.9, 0.5), (0.1, 0.8), ["not better than base at the new skill", "not worse than base at the old skill"]),
        ((0.5, 0.8), (0.51, 0.5), ["not better than base at the new skill (base 0.5 ±0.02, finetuned 0.51 ±0.02)"]),
        ((0.1, 0.8), (0.9, 0.79), ["not worse than base at the old skill"]),
    ],
)
def test_evaluations_that_show_neither_skill_are_doubted(base, finetuned, said):
    skills = {
        name: {"new": Measure(new, 0.02), "old": Measure(old, 0.02)}
        for name, (new, old) in (("base", base), ("finetuned", finetuned))
    }
    found = points(skills, "base", "finetuned")
    why = doubts(found["base"], found["finetuned"])
    assert len(why) == len(said)
    assert all(words in line for words, line in zip(said, why, strict=True))


def test_more_than_all_is_said_in_words():
    assert remarks(point("a", 1.02, -0.03)) == [
        "a is better than finetuned at the new skill: it retains 102.0%",
        "a is better than base at the old skill: it forgets -3.0%",
    ]
    assert remarks(point("a", 1.02, -0.03, 0.05)) == remarks(point("a", 0.9, 0.1)) == []


@pytest.mark.parametrize("how", ["", "best", "retained<=0.9", "forgetting>=0.1", "retained>=x", "retained>0.9"])
def test_ways_that_there_are_not(how):
    with pytest.raises(UserError, match=r"give 'retained>=0\.99'"):
        check_choice(how, ["a"])
    check_choice("a", ["a"])
    check_choice("knee", ["a"])
    check_choice("forgetting<=2%", ["a"])


def test_without_both_skills_there_is_nothing_to_choose_by():
    with pytest.raises(UserError, match="needs the new and the old skill"):
        choose("knee", {"a": Point("a", Measure(1.0), None, Measure(1.0), None)})
