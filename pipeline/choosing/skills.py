"""Measures of a pruned model, the field's: how much of the new skill is retained, how much of the old forgotten.

retained   = new skill of the candidate / new skill of finetuned
forgetting = (old skill of base − of the candidate) / old skill of base, the CF of arXiv 2509.08255

A skill is a number of which more is better, an accuracy for instance. A loss in nats counts as the skill exp(−loss),
the mean probability of a token. Standard errors go through to first order, as if evaluations were independent: those of
two candidates on the same examples agree more than that, so what is told apart here is told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fapm.errors import UserError

SKILLS = ("new", "old")
AXES = (*SKILLS, "retained", "forgetting")
"""Answers about a checkpoint, by skill."""

DEFINITIONS = (
    "retained: new skill / finetuned's; forgetting: (base's old skill − this) / base's. ± is one standard error."
)


@dataclass(frozen=True)
class Measure:
    """A number and its standard error, None where it is not known; and the loss in nats a token, if it was one."""

    value: float
    stderr: float | None = None
    loss: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ±{self.stderr:.2g}" if self.stderr else "")

    def over(self, other: Measure) -> Measure | None:
        """The ratio to another one; None where that is 0."""
        if not other.value:
            return None
        ratio = self.value / other.value
        if self.stderr is None and other.stderr is None:
            return Measure(ratio)
        return Measure(ratio, math.hypot(self.stderr or 0.0, ratio * (other.stderr or 0.0)) / abs(other.value))

    def apart(self, other: Measure) -> float:
        """How much more this is than the other; 0 where their standard errors do not tell them apart."""
        error = math.hypot(self.stderr or 0.0, other.stderr or 0.0)
        difference = self.value - other.value
        return difference if abs(difference) > error else 0.0


def read_skills(said: Any) -> dict[str, Measure]:
    """The skills in what an evaluation says: `{"new": 0.93, "old": 0.81}`.

    Each is a number, or a mapping with a `value` or a `loss` in nats and perhaps a `stderr`, or a mapping of names to
    such, of which the mean is taken.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(said, Mapping):
        raise UserError('an evaluation says a JSON object like {"new": 0.93, "old": 0.81}')
    found = {skill: _measure(said[skill], skill) for skill in SKILLS if said.get(skill) is not None}
    if not found:
        raise UserError(f'an evaluation says at least one of "new" and "old"; it said {", ".join(map(repr, said))}')
    return found


def _measure(said: Any, name: str) -> Measure:
    if not isinstance(said, Mapping):
        return Measure(_number(said, name))
    if "loss" in said or "value" in said:
        stderr = None if said.get("stderr") is None else abs(_number(said["stderr"], f"{name}.stderr"))
        if "value" in said:
            return Measure(_number(said["value"], name), stderr)
        loss = _number(said["loss"], name)
        probability = math.exp(-loss)
        return Measure(probability, None if stderr is None else stderr * probability, loss)
    if not said:
        raise UserError(f"an evaluation says nothing of {name!r}")
    return mean([_measure(one, f"{name}.{key}") for key, one in said.items()])


def mean(measures: Sequence[Measure]) -> Measure:
    """The mean of independent measures."""
    value = sum(one.value for one in measures) / len(measures)
    losses = [one.loss for one in measures if one.loss is not None]
    loss = sum(losses) / len(losses) if len(losses) == len(measures) else None
    if any(one.stderr is None for one in measures):
        return Measure(value, None, loss)
    return Measure(value, math.hypot(*(one.stderr or 0.0 for one in measures)) / len(measures), loss)


def _number(said: Any, name: str) -> float:
    number = math.nan
    if isinstance(said, int | float) and not isinstance(said, bool):
        number = float(said)
    if not math.isfinite(number):
        raise UserError(f"an evaluation says {said!r} of {name!r}, which is no number")
    return number


@dataclass(frozen=True)
class Point:
    """A checkpoint in the picture. What cannot be said, because a skill is missing, is None."""

    name: str
    new: Measure | None
    old: Measure | None
    retained: Measure | None
    forgetting: Measure | None


def point_facts(point: Point | None) -> dict[str, Any]:
    """Answers about a checkpoint, as JSON; of one that was not evaluated, that there are none."""
    measures = {axis: getattr(point, axis, None) for axis in AXES}
    return {axis: asdict(measure) if measure else None for axis, measure in measures.items()}


def doubts(base: Point, finetuned: Point) -> list[str]:
    """Why nothing should be chosen by these evaluations: they do not show that finetuned has learned and forgotten."""
    found = []
    for skill, better, worse, what in (
        ("new", finetuned, base, "finetuned is not better than base at the new skill"),
        (
            "old",
            base,
            finetuned,
            "finetuned is not worse than base at the old skill, so there is nothing to bring back",
        ),
    ):
        high, low = getattr(better, skill), getattr(worse, skill)
        if high and low and high.apart(low) <= 0:
            of = {worse.name: low, better.name: high}
            found.append(f"{what} (base {of['base']}, finetuned {of['finetuned']})")
    return found


def remarks(point: Point) -> list[str]:
    """What is strange about a candidate, in words."""
    found = []
    if point.retained and point.retained.apart(Measure(1.0)) > 0:
        found.append(f"{point.name} is better than finetuned at the new skill: it retains {point.retained.value:.1%}")
    if point.forgetting and point.forgetting.apart(Measure(0.0)) < 0:
        found.append(f"{point.name} is better than base at the old skill: it forgets {point.forgetting.value:.1%}")
    return found


def reference(skills: Mapping[str, Mapping[str, Measure]], names: Sequence[str]) -> str:
    """Of several fine-tuned checkpoints the one that is best at the new skill, which a candidate is to retain."""

    def new(name: str) -> float:
        said = skills.get(name, {}).get("new")
        return said.value if said else -math.inf

    return max(names, key=new)


def points(skills: Mapping[str, Mapping[str, Measure]], base: str, finetuned: str) -> dict[str, Point]:
    """Every checkpoint that was evaluated, by name.

    Args:
        base, finetuned: their names among them.
    """
    found = {}
    old_of_base = skills.get(base, {}).get("old")
    new_of_finetuned = skills.get(finetuned, {}).get("new")
    for name, said in skills.items():
        new, old = said.get("new"), said.get("old")
        kept = old.over(old_of_base) if old and old_of_base else None
        forgetting = Measure(1 - kept.value, kept.stderr) if kept else None
        retained = new.over(new_of_finetuned) if new and new_of_finetuned else None
        if name == base and forgetting:
            forgetting = Measure(0.0)
        if name == finetuned and retained:
            retained = Measure(1.0)
        found[name] = Point(name, new, old, retained, forgetting)
    return found
