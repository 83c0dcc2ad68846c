"""A sweep: candidates over one pair of checkpoints, all made from one reading of it.

They lie in a folder of the output, `sweep/`, each as complete as if `fapm prune` had made it alone, so that whatever
knows an output knows a candidate. What is chosen in the end becomes the output itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from fapm import run
from fapm.card import model_card
from fapm.choosing.candidates import SWEPT, Candidate, alone, candidates
from fapm.choosing.choice import Choice, by_name, check_choice, choose, front
from fapm.choosing.evaluation import Evaluate, Evaluation, Said, evaluate_all, in_turn, printed_by, skills_of
from fapm.choosing.skills import DEFINITIONS, Point, doubts, point_facts, points, reference, remarks
from fapm.choosing.sources import BASE, inputs, output
from fapm.errors import PassingError, UserError
from fapm.formats.side_files import CARD
from fapm.layout import RUN, SWEEP
from fapm.manifest.finish import is_tidy, tidy
from fapm.manifest.read import load_manifest, read_table
from fapm.manifest.state import State, begin, begun, check_folder, differences, identity, refuse_links, settle
from fapm.planning.make import make_plans
from fapm.planning.plan import Plan
from fapm.publish import prune_and_publish, staged_recipe
from fapm.recipe import Recipe, binary, option_words
from fapm.run import MakePool, Result
from fapm.schedule import LeasedRun, Watch
from fapm.schemas import SweepRecord
from fapm.shard.budget import runs_at_once
from fapm.storage.address import inside, is_repository, open_store
from fapm.storage.lease import lease
from fapm.storage.records import read_record

SWEEP_FILE = "sweep.json"
"""In the folder of the candidates, what the last sweep has come to."""


@dataclass(frozen=True)
class Made:
    """A candidate that is there, and whether it was before."""

    candidate: Candidate
    plan: Plan
    manifest: dict[str, Any]
    was_there: bool


def sweep_folder(recipe: Recipe) -> str:
    """Where the candidates of an output lie.

    Raises:
        UserError: the path of the output has fields, or something in it is a link.
    """
    if "{" in recipe.out.replace("{{", "").replace("}}", ""):
        raise UserError(f"--out {recipe.out}: the output of a sweep has no fields in its path")
    out = staged_recipe(recipe).out
    folder = f"{out}-{SWEEP}" if is_repository(recipe.out) else inside(out, SWEEP)
    refuse_links(open_store(folder))
    return folder


def sweep(
    candidates: Sequence[Candidate],
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
    plans: Sequence[tuple[Plan, State]] = (),
) -> list[Made]:
    """Make candidates, or go on with those that were not finished.

    Args:
        candidates: over the same inputs, that differ in what `candidates.SWEPT` names.
        plans: theirs, if they have been made.

    Raises:
        UserError: as of `run.prune`.
    """
    watch = watch or Watch()
    plans = plans or _plans(candidates, overwrite)
    there = {c.name for c, (plan, state) in zip(candidates, plans, strict=True) if _is_done(plan, state)}
    todo = [(c, *of) for c, of in zip(candidates, plans, strict=True) if c.name not in there]
    run.check_disk_for([(plan, state) for _, plan, state in todo])
    for batch in _batches(todo, watch):
        watch.say(f"{len(batch)} candidate(s) from one reading: {', '.join(c.name for c, *_ in batch)}")
        with ExitStack() as held:
            leased = []
            for _, plan, _ in batch:
                out = held.enter_context(lease(plan.recipe.out, watch.say, plan.recipe.alone))
                _, state = _settled(plan, overwrite)  # another run may have held it until now
                if state == "finished":
                    tidy(plan, out)
                    continue
                begin(plan, state, out)
                leased.append(LeasedRun(plan, out))
            if leased:
                run.prune_all(leased, pool, watch)
    return [
        Made(c, plan, load_manifest(plan.recipe.out), c.name in there)
        for c, (plan, _) in zip(candidates, plans, strict=True)
    ]


def _plans(candidates: Sequence[Candidate], overwrite: bool) -> list[tuple[Plan, State]]:
    plans = make_plans([candidate.recipe for candidate in candidates])
    assert all(plan.shards[0].header == plans[0].shards[0].header for plan in plans)
    return [_settled(plan, overwrite) for plan in plans]


def _settled(plan: Plan, overwrite: bool) -> tuple[Plan, State]:
    """A candidate that is there stays, also where another run in its place would be overwritten."""
    try:
        return settle(plan)
    except PassingError:
        raise
    except UserError:
        if not overwrite:
            raise
        return settle(plan, overwrite)


def _is_done(plan: Plan, state: State) -> bool:
    return state == "finished" and is_tidy(plan)


Todo = tuple[Candidate, Plan, State]


def _batches(todo: Sequence[Todo], watch: Watch) -> list[Sequence[Todo]]:
    """As many candidates at once as the memory of a worker allows."""
    by_kind = [
        [one for one in todo if (one[1].operation == "matrices") is as_matrices] for as_matrices in (False, True)
    ]
    return [batch for alike in by_kind if alike for batch in _batches_of(alike, watch)]


def _batches_of(todo: Sequence[Todo], watch: Watch) -> list[Sequence[Todo]]:
    recipe = todo[0][1].recipe
    slots = recipe.cpus_per_worker or 1
    most = runs_at_once(recipe.model_copy(update={"memory": recipe.memory // slots}), todo[0][1].out)
    count = -(-len(todo) // most)
    if count > 1:
        watch.say(
            f"note: the inputs are read {count} times: {most} candidate(s) at once fit in --memory "
            f"{binary(recipe.memory)}"
        )
    size = -(-len(todo) // count)
    return [todo[i : i + size] for i in range(0, len(todo), size)]


@dataclass(frozen=True)
class Swept:
    """A sweep: its candidates, what was said of them, of base and of finetuned, which was taken, and the command that
    does it again."""

    folder: str
    made: Sequence[Made]
    said: dict[str, Said]
    choice: Choice | None = None
    command: tuple[str, ...] = ()

    @property
    def finetuned(self) -> dict[str, str]:
        """Names of the fine-tuned checkpoints, and where they are: the one first by which candidates are measured."""
        paths = dict(zip(list(self.made[0].plan.inputs)[1:], self.made[0].plan.recipe.checkpoints[1:], strict=True))
        first = reference(skills_of(self.said.values()), list(paths))
        return {first: paths[first], **paths}

    @property
    def points(self) -> dict[str, Point]:
        """Everything that was evaluated, by name."""
        return points(skills_of(self.said.values()), BASE, next(iter(self.finetuned)))

    @property
    def candidate_points(self) -> dict[str, Point]:
        inputs = self.made[0].plan.inputs
        return {name: point for name, point in self.points.items() if name not in inputs}


def evaluate_inputs(folder: str, plan: Plan, asked: Evaluation, do: Evaluate, watch: Watch) -> dict[str, Said]:
    """Evaluate base and finetuned, before anything is pruned, and keep what is said in the sweep's folder.

    Raises:
        UserError: one cannot be evaluated, and so nothing else could.
    """
    said = evaluate_all(asked, inputs(plan), open_store(folder), do, watch.say)
    for one in said.values():
        if one.error:
            for line in printed_by(one):
                watch.say(f"  {line}")
            raise UserError(
                f"{one}; nothing was pruned, since no candidate could be evaluated either. All that it printed is in "
                f"{open_store(folder).at('evaluations')}"
            )
    return said


def evaluate_sweep(
    folder: str, made: Sequence[Made], asked: Evaluation, do: Evaluate = in_turn, watch: Watch | None = None
) -> Swept:
    """Evaluate base, finetuned and all candidates, and keep what is said in the sweep's folder."""
    watch = watch or Watch()
    if asked.is_none:
        return Swept(folder, made, {})
    sources = inputs(made[0].plan)
    for one in made:
        where = one.plan.out.absolute().address
        sources.append(output(one.candidate.name, where, one.manifest, one.plan.recipe))
    kept = open_store(folder)
    return Swept(folder, made, evaluate_all(asked, sources, kept, do, watch.say))


def take(
    swept: Swept,
    choice: Choice,
    out: str,
    *,
    overwrite: bool = False,
    pool: MakePool | None = None,
    watch: Watch | None = None,
) -> Result:
    """Make `out` the chosen candidate, as a whole checkpoint.

    Raises:
        UserError: as of `run.prune`; `out` is another model, and it is not said that it is to be replaced.
    """
    recipe = _taken(swept, choice.name).model_copy(update={"out": out})
    there = open_store(recipe.out) if not is_repository(recipe.out) else None
    how = chosen_text(swept, choice)
    result = prune_and_publish(recipe, overwrite=overwrite, pool=pool, watch=watch, chosen=how)
    if result.nothing_to_do and there and how not in there.read(CARD).decode(errors="replace"):
        plan = replace(result.plan, chosen=how)
        there.write(CARD, model_card(plan, read_table(recipe.out)).encode())
    return result


def chosen_text(swept: Swept, choice: Choice) -> str:
    """How a candidate was chosen, in Markdown."""
    lines = [f"Chosen from a sweep: {choice.why}."]
    if choice.alike:
        lines.append(f"The standard errors do not tell it from {', '.join(choice.alike)}.")
    found = swept.points
    if found:
        lines += ["", "| | new skill | old skill | retained | forgetting |", "| --- | ---: | ---: | ---: | ---: |"]
        for point in found.values():
            name = f"**{point.name}**" if point.name == choice.name else point.name
            cells = [name, *(str(m) if m else "–" for m in (point.new, point.old, point.retained, point.forgetting))]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", DEFINITIONS]
    return "\n".join(lines)


def sweep_facts(swept: Swept) -> dict[str, Any]:
    """A sweep as it is kept beside its candidates, and as JSON."""
    found, best = swept.candidate_points, set()
    with_both = {name: point for name, point in found.items() if point.retained and point.forgetting}
    if with_both:
        best = {point.name for point in front(with_both)}
    candidates = []
    for one in swept.made:
        name, recipe, totals = one.candidate.name, one.plan.recipe, one.manifest["totals"]
        candidates.append(
            {
                "name": name,
                "out": recipe.out,
                "method": recipe.method,
                "scope": recipe.scope,
                "density": recipe.density,
                "strength": recipe.strength,
                "layer_scale": recipe.layer_scale and recipe.layer_scale.plain(),
                "tail": recipe.tail,
                "rank": recipe.rank,
                "decides": recipe.decides(),
                "kept": totals["kept"],
                "pruned_numel": totals["pruned_numel"],
                "kept_share": totals["kept_share"],
                "written_bytes": totals["written_bytes"],
                **_said(swept, name),
                "front": name in best,
            }
        )
    first, finetuned = swept.made[0].plan.recipe, list(swept.finetuned.items())
    return {
        "base": {"path": first.base, **_said(swept, BASE)},
        "finetuned": {"path": finetuned[0][1], **_said(swept, finetuned[0][0])},
        **(
            {"sources": [{"path": path, **_said(swept, name)} for name, path in finetuned[1:]]} if finetuned[1:] else {}
        ),
        "candidates": candidates,
        "chosen": asdict(swept.choice) | {"decides": _taken(swept, swept.choice.name).decides()}
        if swept.choice
        else None,
        "command": list(swept.command),
    }


def _taken(swept: Swept, name: str) -> Recipe:
    """The recipe of the output that a candidate becomes: a whole checkpoint."""
    recipe = next(one.candidate.recipe for one in swept.made if one.candidate.name == name)
    return recipe.model_copy(update={"emit": "checkpoint"})


def _said(swept: Swept, name: str) -> dict[str, Any]:
    said = swept.said.get(name)
    facts = {"error": said.error, "seconds": said.seconds} if said else {}
    return facts | point_facts(swept.points.get(name))


def write_sweep(swept: Swept) -> dict[str, Any]:
    """Keep what a sweep has come to, and, where it has chosen nothing, what one before it had chosen; returns it."""
    facts = sweep_facts(swept)
    if not facts["chosen"]:
        facts["chosen"] = (read_sweep(swept.folder) or {}).get("chosen")
    open_store(swept.folder).write(SWEEP_FILE, json.dumps(facts, indent=1).encode())
    return facts


def read_sweep(folder: str) -> dict[str, Any] | None:
    """Record of the last sweep in this folder; None if there was none."""
    store = open_store(folder)
    if not store.has(SWEEP_FILE):
        return None
    return read_record(store, SWEEP_FILE, SweepRecord, "not what a sweep of this version has come to")


def _command(choices: dict[str, Any], asked: Evaluation, how: str | None) -> tuple[str, ...]:
    """The words with which this sweep is done again, evaluation and seed included."""
    if choices.get("merged"):
        return ()  # its sources are in a file
    words = ["fapm", "sweep"]
    for name, value in choices.items():
        several = name in SWEPT and isinstance(value, list | tuple)
        words += option_words(
            name, ",".join(map(str, value)) if several else list(value) if isinstance(value, tuple) else value
        )
    words += [word for command in asked.commands for word in ("--evaluate", command)]
    words += [w for s, names in asked.tasks.items() for w in ("--tasks", f"{s}={','.join(names)}")]
    words += [w for s, path in asked.texts.items() for w in ("--text", f"{s}={path}")]
    return (*words, *(("--choose", how) if how else ()))


def _doubts(said: dict[str, Said]) -> list[str]:
    skills = skills_of(said.values())
    first = reference(skills, [name for name in skills if name != BASE])
    found = points(skills, BASE, first)
    return doubts(found[BASE], found[first])


def _check_out(out: str, plans: Sequence[Plan]) -> None:
    """Find out before anything is evaluated that the output is another model than any candidate.

    Raises:
        UserError: it is, or something else.
    """
    wholes = [replace(p, recipe=p.recipe.model_copy(update={"out": out, "emit": "checkpoint"})) for p in plans]
    there = open_store(out)
    if there.has(RUN) and any(not differences(begun(there), identity(plan)) for plan in wholes):
        return
    check_folder(wholes[0], overwrite=False)


@dataclass(frozen=True)
class EndedSweep:
    """A sweep that has ended: its facts, its output folder, and the evaluations that failed, of how many."""

    facts: dict[str, Any]
    out: str
    failed: Sequence[Said]
    evaluations: int


class NoChoiceError(UserError):
    """No candidate can be chosen as was asked. `facts` are those of the sweep, which is complete."""

    def __init__(self, why: str, facts: dict[str, Any], out: str):
        super().__init__(why)
        self.facts, self.out = facts, out


def run_sweep(
    choices: dict[str, Any],
    asked: Evaluation,
    how: str | None = None,
    *,
    choose_anyway: bool = False,
    overwrite: bool = False,
    pool: MakePool | None = None,
    evaluator: Callable[[Recipe], Evaluate] | None = None,
    watching: Callable[[], AbstractContextManager[Watch]] = lambda: nullcontext(Watch()),
) -> EndedSweep:
    """Make the candidates, evaluate them, and make the output of the chosen one.

    Args:
        how: one is chosen; none if it is None.
        choose_anyway: also where the evaluations of base and finetuned do not show what was learned and forgotten.
        evaluator: makes what evaluates, for a recipe.
        watching: what is told about the progress of a prune, for as long as it goes.

    Raises:
        UserError: as of `prune`, or the choice cannot be made before anything is.
        NoChoiceError: after all evaluations.
    """
    one = alone(choices)
    folder = sweep_folder(one)
    wanted = candidates(choices, folder)
    names = [candidate.name for candidate in wanted]
    if how:
        check_choice(how, names)
        if asked.is_none and how not in names:
            raise UserError(f"--choose {how} needs --evaluate, --tasks or --text")
    plans = _plans(wanted, overwrite)
    first = plans[0][0]
    if how and not overwrite and not is_repository(one.out):
        _check_out(one.out, [plan for plan, _ in plans])
    do = evaluator(first.recipe) if evaluator else in_turn
    said: dict[str, Said] = {}
    if not asked.is_none:
        with watching() as watch:
            said = evaluate_inputs(folder, first, asked, do, watch)
        unsure = _doubts(said)
        for line in unsure:
            watch.say(f"note: {line}")
        if unsure and how and how not in names and not choose_anyway:
            raise UserError(
                f"nothing is chosen where the evaluation does not show what was learned and forgotten: {unsure[0]}. "
                "Are the two swapped, or is it the wrong test? --choose-anyway goes on"
            )
    with watching() as watch:
        made = sweep(wanted, overwrite=overwrite, pool=pool, watch=watch, plans=plans)
    watch.say(f"{len(made)} candidate(s) in {folder}")
    swept = replace(evaluate_sweep(folder, made, asked, do, watch), command=_command(choices, asked, how))
    for point in swept.candidate_points.values():
        for line in remarks(point):
            watch.say(f"note: {line}")
    facts = write_sweep(swept)
    if how:
        try:
            found = swept.candidate_points
            choice = by_name(how, len(names), found) if how in names else choose(how, found)
        except UserError as error:
            raise NoChoiceError(str(error), {"out": one.out, **facts}, one.out) from None
        with watching() as watch:
            take(swept, choice, one.out, overwrite=overwrite, pool=pool, watch=watch)
        facts = write_sweep(replace(swept, choice=choice))
    failed = [said for said in swept.said.values() if said.error]
    return EndedSweep({"out": one.out, **facts}, one.out, failed, len(swept.said))
