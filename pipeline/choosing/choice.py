"""Which candidate to take: the least forgetting above a floor, the knee of the trade-off, or one by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fapm.choosing.skills import Measure, Point
from fapm.errors import UserError

KNEE = "knee"
_RULE = re.compile(r"\s*(retained|forgetting)\s*(>=|<=)\s*([0-9]*\.?[0-9]+)(%?)\s*")


@dataclass(frozen=True)
class Choice:
    """The candidate that was taken, why, those that the standard errors do not tell from it, and the rule, if one was
    given."""

    name: str
    why: str
    alike: tuple[str, ...] = ()
    how: str = field(default="", compare=False)


def check_choice(how: str, names: Sequence[str]) -> None:
    """Find out before anything is evaluated that there is no such way to choose.

    Raises:
        UserError: there is not.
    """
    if how == KNEE or how in names:
        return
    rule = _RULE.fullmatch(how)
    if not rule or (rule[1] == "retained") != (rule[2] == ">="):
        raise UserError(
            f"--choose {how}: give 'retained>=0.99', 'forgetting<=0.02', knee, or one of the candidates: "
            f"{', '.join(names)}"
        )


def bound_of(how: str) -> tuple[str, float] | None:
    """What a rule is about, `retained` or `forgetting`, and its bound, as a share; None where it is no rule."""
    rule = _RULE.fullmatch(how)
    return (rule[1], float(rule[3]) / (100 if rule[4] else 1)) if rule else None


def by_name(name: str, of: int, found: Mapping[str, Point]) -> Choice:
    """The one candidate `of` so many that the user names; `found` are those that were evaluated."""
    little = _little(found[name]) if name in found else ""
    return Choice(name, f"it was chosen by name, out of {of} candidates{little}")


def choose(how: str, found: Mapping[str, Point]) -> Choice:
    """The candidate that `how`, which is no name, means.

    Args:
        found: the candidates that were evaluated.

    Raises:
        UserError: none is like that, or what it asks for was not evaluated.
    """
    both = {name: point for name, point in found.items() if point.retained and point.forgetting}
    if not both:
        raise UserError(
            f"--choose {how} needs the new and the old skill of at least one candidate, of base and of finetuned"
        )
    if how == KNEE:
        apart = _told_apart(both)
        if apart < _FEWEST:
            raise UserError(
                f"--choose knee: the errors tell {apart} of {len(both)} candidate(s) apart, and a knee wants "
                f"{_FEWEST}; evaluate on more examples, sweep more widely, or ask for 'retained>=0.95' or a name"
            )
        name = _knee(both)
        why = f"it is the knee of the trade-off of {len(both)} candidates{_little(both[name])}"
        return Choice(name, why, _alike(name, both))
    rule = bound_of(how)
    assert rule
    axis, bound = rule
    fits = {n: p for n, p in both.items() if (_of(p, axis).value - bound) * (1 if axis == "retained" else -1) >= 0}
    if not fits:
        best = (max if axis == "retained" else min)(both.values(), key=lambda point: _of(point, axis).value)
        raise UserError(f"--choose {how}: no candidate is like that; {best.name} comes closest, {_of(best, axis)}")
    aim, least = ("forgetting", "least forgetting") if axis == "retained" else ("retained", "most retained")
    sign = 1 if aim == "forgetting" else -1
    first = min(fits.values(), key=lambda point: sign * _of(point, aim).value)
    # Of those that are not told from it, the one that is best in the other respect.
    alike = [p for p in fits.values() if not _of(p, aim).apart(_of(first, aim))]
    taken = min(alike, key=lambda p: (-sign * _of(p, axis).value, sign * _of(p, aim).value))
    others = tuple(p.name for p in alike if p is not taken)
    why = f"it has the {least} of {len(fits)} of {len(both)} candidates with {how}{_little(taken)}"
    return Choice(taken.name, why, others, how)


_FEWEST = 3
"""Candidates of a trade-off that has a knee, at least."""


def _told_apart(found: Mapping[str, Point]) -> int:
    """How many of the candidates the standard errors tell from each other, by what they retain and forget."""
    apart: list[Point] = []
    for point in sorted(found.values(), key=lambda p: _of(p, "retained").value):
        if all(any(_of(point, axis).apart(_of(p, axis)) for axis in ("retained", "forgetting")) for p in apart):
            apart.append(point)
    return len(apart)


def _little(point: Point) -> str:
    """A remark on a choice that gives away most of the new skill."""
    retained = point.retained
    return (
        f"; it retains less than half of the new skill, {retained.value:.1%}"
        if retained and retained.value < 0.5
        else ""
    )


def _of(point: Point, axis: str) -> Measure:
    found: Measure = getattr(point, axis)
    return found


def _alike(name: str, found: Mapping[str, Point]) -> tuple[str, ...]:
    taken = found[name]
    return tuple(
        other.name
        for other in found.values()
        if other is not taken
        and not any(_of(other, axis).apart(_of(taken, axis)) for axis in ("retained", "forgetting"))
    )


def front(found: Mapping[str, Point]) -> list[Point]:
    """The candidates than which no other is better in one respect and as good in the other, by what they retain."""
    places = {n: (_of(p, "retained").value, -_of(p, "forgetting").value) for n, p in found.items()}
    best = [
        found[name]
        for name, here in places.items()
        if not any(there != here and there[0] >= here[0] and there[1] >= here[1] for there in places.values())
    ]
    return sorted(best, key=lambda point: _of(point, "retained").value)


def _knee(found: Mapping[str, Point]) -> str:
    """Of the front, the point farthest beyond the line between its ends, both axes scaled to them; of a front without
    one, the point nearest to what has all of the new skill and has forgotten nothing."""
    line = front(found)
    places = [(_of(p, "retained").value, _of(p, "forgetting").value) for p in line]
    (x0, y0), (x1, y1) = places[0], places[-1]
    if len(line) > 2 and x1 > x0 and y1 > y0:
        beyond = [(x - x0) / (x1 - x0) - (y - y0) / (y1 - y0) for x, y in places]
        best = max(range(len(line)), key=beyond.__getitem__)
        if beyond[best] > 0:
            return line[best].name
    return min(line, key=lambda p: (1 - _of(p, "retained").value) ** 2 + _of(p, "forgetting").value ** 2).name
