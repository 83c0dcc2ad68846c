"""Where the work is done: in this process, or on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fapm.cluster.commands.saying import log
from fapm.cluster.entering import before_ray

if TYPE_CHECKING:
    from fapm.choosing.evaluation import Evaluate
    from fapm.planning.plan import Plan
    from fapm.pool import Pool
    from fapm.recipe import Recipe
    from fapm.run import MakePool
    from fapm.schedule import Watch
    from fapm.storage.store import Store


def evaluator_at(ray: str, recipe: Recipe) -> Evaluate:
    if ray == "off":
        from fapm.choosing.evaluation import in_turn

        return in_turn
    before_ray(ray)
    from fapm.cluster.evaluating import on_ray

    return on_ray(ray, recipe, log)


def pool_at(ray: str, by: str) -> MakePool:
    """Maker of the workers, that says which they are and why."""

    def make(plan: Plan, out: Store, watch: Watch) -> Pool:
        if ray == "off":
            from fapm.recipe import ON_RAY_ONLY
            from fapm.run import in_process

            threads = in_process(plan, out, watch)
            why = f"by {by}" if by else "give --ray to use a cluster"
            for name in (name for name in ON_RAY_ONLY if getattr(plan.recipe, name)):
                watch.say(f"note: {name.replace('_', '-')} means nothing without Ray")
            watch.say(f"running in this process with {threads.workers} worker(s) ({why})")
            return threads
        before_ray(ray)
        from fapm.cluster.pool import ray_pool

        known = {"local": "a Ray of its own on this machine", "auto": "the Ray cluster of this machine"}
        where = known.get(ray, f"the Ray cluster at {ray}")
        watch.say(f"running on {where} (by {by})")
        return ray_pool(ray)(plan, out, watch)

    return make
