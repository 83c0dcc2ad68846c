"""Thresholds of the groups that lie in several shards: a sample brackets them, counts narrow the brackets.

The counts are the reduction of a distributed run: workers leave histograms in the output folder, which are added up
here (SEMANTICS.md, "Exact top-k without a sort"). What is found is kept, so that it is not looked for again.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fapm.layout import WORK, measure_name, sample_name, thresholds_name
from fapm.manifest.read import read_run_file
from fapm.planning.plan import Group, Plan, Shard
from fapm.schedule import COUNTED, SAMPLED, Request
from fapm.schemas import ThresholdsRecord
from fapm.scoring.threshold import Bracket, Histograms, Threshold, bins_of, histograms
from fapm.shard.sample import Survey
from fapm.shard.task import Done, LaneTask, known_threshold, load_arrays
from fapm.shard.worker import Worker
from fapm.storage.store import Store, overlapped


def find_thresholds(
    plan: Plan, out: Store
) -> Generator[Request, list[Done], tuple[dict[str, Threshold], dict[int, dict[str, int]], int]]:
    """The thresholds of the groups that lie in several shards.

    Returns:
        The thresholds by group; each shard's part of their tie quotas; how often the groups were measured.
    """
    found = load_thresholds(out, plan.source)
    if found:
        return found
    cross_shard = cross_shard_groups(plan)
    thresholds = {name: known for name, known in cross_shard.items() if known}
    brackets = yield from first_brackets(plan, out, [name for name in cross_shard if name not in thresholds])
    rounds = 0
    last_round: dict[str, tuple[int, Bracket]] = {}
    while brackets:
        rounds += 1
        last_round |= {name: (rounds, bracket) for name, bracket in brackets.items()}
        counted = yield from measured(plan, out, brackets, rounds)
        for i, name in enumerate(list(brackets)):
            result = counted.narrow(i, plan.groups[name].k)
            if isinstance(result, Threshold):
                thresholds[name] = result
                del brackets[name]
            else:
                brackets[name] = result
    quotas = share_ties(plan, out, thresholds, last_round)
    if thresholds:
        save_thresholds(out, plan.source, thresholds, quotas, rounds)
    return thresholds, quotas, rounds


def holders(plan: Plan, groups: Iterable[str]) -> list[Shard]:
    """The shards that hold tensors of these groups."""
    wanted = set(groups)
    return [s for s in plan.shards if any(t.group in wanted for t in s.tensors)]


def first_brackets(plan: Plan, out: Store, names: Sequence[str]) -> Generator[Request, list[Done], dict[str, Bracket]]:
    """Where a sample says that the thresholds of some groups are."""
    shards = holders(plan, names)
    there = out.files(WORK)
    tasks = [task_of(plan, out, s) for s in shards if sample_name(s.index, plan.source) not in there]
    if tasks:
        yield Request(Worker.sample, tasks, SAMPLED)
    surveys = {name: Survey() for name in names}

    def load(shard: Shard) -> tuple[list[str], dict[str, np.ndarray]]:
        return load_arrays(out, sample_name(shard.index, plan.source), "weights", "variance")

    for groups, saved in overlapped(load, shards, out.reads_at_once):
        for name, weights, variance in zip(groups, saved["weights"], saved["variance"], strict=True):
            if name in surveys:
                surveys[name].weights += weights
                surveys[name].variance += float(variance)
    return {name: found.bracket(plan.groups[name]) for name, found in surveys.items()}


def measured(
    plan: Plan, out: Store, brackets: dict[str, Bracket], round_: int
) -> Generator[Request, list[Done], Histograms]:
    """Count every score of some groups: above the bracket, and inside by bins. The reduction of a distributed run."""
    sums = histograms(list(brackets.values()))
    place = {name: i for i, name in enumerate(brackets)}

    def add(shard: int) -> None:
        groups, saved = load_arrays(out, measure_name(shard, round_, plan.source), "above", "bins", "starts")
        for i, name in enumerate(groups):
            sums.above[place[name]] += saved["above"][i]
            sums.of(place[name])[:] += saved["bins"][saved["starts"][i] : saved["starts"][i + 1]]

    tasks, there = [], out.files(WORK)
    for shard in holders(plan, brackets):
        if measure_name(shard.index, round_, plan.source) in there:
            add(shard.index)
        else:
            mine = {name: brackets[name] for name in groups_of(plan, shard) if name in brackets}
            tasks.append(replace(task_of(plan, out, shard), brackets=mine, round=round_))
    if tasks:
        done = yield Request(Worker.measure, tasks, COUNTED, bytes_of(plan, brackets) if round_ > 1 else 0)
        for one in done:
            add(one.shard)
    return sums


def share_ties(
    plan: Plan, out: Store, thresholds: dict[str, Threshold], last_round: dict[str, tuple[int, Bracket]]
) -> dict[int, dict[str, int]]:
    """Hand out the tie quotas in the order of the shards, which is the order of the tensors' names."""
    left = {name: threshold.ties for name, threshold in thresholds.items()}
    places = {name: bins_of(bracket).place(thresholds[name].key) for name, (_, bracket) in last_round.items()}
    quotas: dict[int, dict[str, int]] = {}
    for shard in holders(plan, thresholds):
        quotas[shard.index] = {}
        loaded: dict[int, dict[str, np.ndarray]] = {}  # by round, each group's bins
        for name in sorted({t.group for t in shard.tensors if t.group in thresholds}):
            part = 0
            if left[name] and name in last_round:
                round_, _ = last_round[name]
                if round_ not in loaded:
                    groups, saved = load_arrays(out, measure_name(shard.index, round_, plan.source), "bins", "starts")
                    loaded[round_] = dict(zip(groups, np.split(saved["bins"], saved["starts"][1:-1]), strict=True))
                part = min(left[name], int(loaded[round_][name][places[name]]))
            quotas[shard.index][name] = part
            left[name] -= part
    assert not any(left.values()), left
    return quotas


def task_of(plan: Plan, out: Store, shard: Shard) -> LaneTask:
    """Work on a shard of a plan, as of yet without what was found."""
    read = plan.within[shard.index] if plan.within else None
    return LaneTask(plan.recipe, out, shard, groups_of(plan, shard), source=plan.source, read=read)


def groups_of(plan: Plan, shard: Shard) -> dict[str, Group]:
    return {t.group: plan.groups[t.group] for t in shard.tensors if t.group}


def to_measure(plan: Plan) -> int:
    """Input bytes of the groups that lie in several shards and whose threshold has to be found."""
    wanted = set()
    for lane in plan.lanes or (plan,):
        unknown = {name for name, known in cross_shard_groups(lane).items() if known is None}
        wanted |= {t.name for t in lane.tensors() if t.group in unknown}
    return sum(t.read_bytes for t in plan.tensors() if t.name in wanted)


def bytes_of(plan: Plan, groups: Iterable[str]) -> int:
    """Input bytes of some groups."""
    wanted = set(groups)
    return sum(t.read_bytes for t in plan.tensors() if t.group in wanted)


def cross_shard_groups(plan: Plan) -> dict[str, Threshold | None]:
    """The groups that lie in several shards, and their thresholds where no score needs to be looked at."""
    cross_shard = {name: group for name, group in plan.groups.items() if group.cross_shard}
    return {name: known_threshold(plan.recipe, group, 0) for name, group in cross_shard.items()}


def save_thresholds(
    out: Store, source: int, thresholds: dict[str, Threshold], quotas: dict[int, dict[str, int]], rounds: int
) -> None:
    """Keep what was found for the groups over several shards, so that it is not looked for again."""
    data = {
        "thresholds": {name: [t.key, t.ties] for name, t in thresholds.items()},
        "quotas": {str(shard): part for shard, part in quotas.items()},
        "rounds": rounds,
    }
    out.write(thresholds_name(source), json.dumps(data).encode())


def load_thresholds(out: Store, source: int = 0) -> tuple[dict[str, Threshold], dict[int, dict[str, int]], int] | None:
    if not out.has(thresholds_name(source)):
        return None
    data = read_run_file(out, thresholds_name(source), ThresholdsRecord)
    thresholds = {name: Threshold(key, ties) for name, (key, ties) in data["thresholds"].items()}
    return thresholds, {int(shard): part for shard, part in data["quotas"].items()}, data["rounds"]
