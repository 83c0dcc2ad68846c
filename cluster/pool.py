"""The pool whose workers are Ray actors: they come, go and die, and no work is lost.

`fapm.dispatcher` decides which worker does what; here its decisions meet Ray. Only names, offsets and thresholds
travel to an actor, and a few numbers back: weights and counts go through the folders that driver and workers share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from fapm.cluster.actor import FapmWorker, Sight
from fapm.cluster.demand import demand
from fapm.cluster.entering import cannot_enter, check_address, knock, last_line
from fapm.cluster.metrics import Metrics
from fapm.dispatcher import Accept, Action, Ask, Dispatcher, Loss, Release, Start, Stop
from fapm.errors import DeviceError, PassingError, UserError
from fapm.layout import RUN
from fapm.manifest.state import unfinished_shards
from fapm.planning.plan import Plan
from fapm.pool import Step, cores
from fapm.recipe import Recipe
from fapm.run import MakePool
from fapm.schedule import Watch
from fapm.shard.task import Done, Task
from fapm.shard.worker import Worker
from fapm.storage.address import absolute
from fapm.storage.store import Store

_TICK_SECONDS = 1.0
_SAY_SECONDS = 60.0  # between two lines that say what the run is waiting for
_GONE_SECONDS = 5 / 6 * float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60))  # noqa: SIM112
"""Of silence of the cluster's head. Ray itself waits for it six fifths of that, then ends the process on the spot."""
headless = False
"""Whether a pool was closed whose cluster's head was gone: whatever asks Ray for something hangs from then on."""

_LOST = {
    Loss.CRASHED: "was lost",
    Loss.PREEMPTED: "was preempted",
    Loss.HUNG: "took far too long and was given up",
    Loss.DEVICE: "was given up",
}


def ray_pool(address: str) -> MakePool:
    """Maker of a pool on the cluster at `address`; `local` starts one on this machine for the time of the run."""
    return lambda plan, out, watch: RayPool(plan, out, watch, address)


class RayPool:
    """Ray actors, as many as the recipe says, or one for each GPU of the cluster or, where it has none, each CPU.

    Raises:
        UserError: the cluster cannot be reached, a worker cannot start, or a shard fails again and again.
    """

    def __init__(self, plan: Plan, out: Store, watch: Watch, address: str):
        self._watch = watch
        self._names = {shard.index: shard.name for shard in plan.shards}
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(address, plan.recipe, watch.say)
        try:
            self._begin(plan, out)
        except BaseException:
            if self._owns_ray:
                ray.shutdown()
            raise

    def _begin(self, plan: Plan, out: Store) -> None:
        """Ask for workers."""
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._demand = demand(plan.recipe, len(plan.shards), resources)
        self.workers = self._demand.workers.most
        try:
            self._remote: Any = ray.remote(FapmWorker).options(**self._demand.options)
        except ValueError as error:
            raise UserError(f"Ray does not take what is asked of a worker: {last_line(error)}") from None
        self._recipe = self._demand.recipe(plan.recipe).with_paths(absolute)
        self._out = out.absolute()
        self._sight = _sight(plan, self._recipe, self._out)
        self._dispatcher = Dispatcher(self.workers, least=self._demand.workers.least, slots=self._demand.slots)
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._places: dict[int, str] = {}  # host and process
        self._last_loss = ""
        self._leaving: set[str] = set()  # nodes that have got notice
        self._calls: dict[Any, tuple[int, int | None]] = {}  # under way: the worker, and its task or None: it starts
        self._errors: dict[int, Exception] = {}  # the last of each task
        self._head = str(ray.get_runtime_context().gcs_address)
        self._looked = self._said_waiting = self._heard_of_head = time.monotonic()
        self._metrics = Metrics(self._out.address, len(unfinished_shards(plan)))
        self._watch.note("asked", workers=self.workers, each=str(self._demand))
        self._do(self._dispatcher.prepare(), _nothing, {})

    def wait_until_ready(self) -> None:
        """Return when all wanted workers can begin."""
        while self._dispatcher.ready_workers < self.workers:
            self._listen(_nothing, {})

    def map(self, step: Step, tasks: Sequence[Task]) -> Iterator[Done]:
        by_index = {task.shard.index: task for task in tasks}
        sizes = {i: float(sum(t.read_bytes for t in task.shard.tensors)) for i, task in by_index.items()}
        self._do(self._dispatcher.begin(sizes, time.monotonic(), last=step is Worker.write), step, by_index)
        while not self._dispatcher.finished:
            for done in self._listen(step, by_index):
                self._watch.advance(done.progress_bytes)
                self._metrics.done(done, wrote=step is Worker.write)
                yield done

    def _listen(self, step: Step, by_index: dict[int, Task]) -> list[Done]:
        """Wait for something to happen, for a second at most, and react; returns the results that count."""
        found = []
        calls, _ = ray.wait(list(self._calls), num_returns=1, timeout=_TICK_SECONDS, fetch_local=True)
        for call in calls:
            worker, task = self._calls.pop(call)
            actions, result = self._heard(call, worker, task)
            for accepted in self._do(actions, step, by_index):
                assert result
                found.append(replace(result, tries=accepted.tries))
        self._look_around(step, by_index)
        return found

    def _heard(self, call: Any, worker: int, task: int | None) -> tuple[list[Action], Done | None]:
        """Actions of the dispatcher upon the outcome of a call, and the result if it is one."""
        now = time.monotonic()
        try:
            outcome = ray.get(call)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, DeviceError):
                return self._lost(worker, Loss.DEVICE, str(cause), now), None
            if task is None:
                raise cause from error  # a worker that cannot start would not elsewhere
            hopeless = isinstance(cause, UserError) and not isinstance(cause, PassingError)
            self._errors[task] = cause
            return self._dispatcher.failed(worker, task, last_line(cause), now, hopeless), None
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise UserError(f"a Ray worker cannot start: {last_line(error)}") from error
            preempted = isinstance(error, RayActorError) and error.preempted
            how = Loss.PREEMPTED if preempted or self._nodes.get(worker) in self._leaving else Loss.CRASHED
            why = "out of memory" if isinstance(error, OutOfMemoryError) else ""
            return self._lost(worker, how, _first_line(error), now, why), None
        if task is None:
            self._nodes[worker], self._places[worker] = outcome
            self._watch.note("ready", worker=worker, where=self._places[worker])
            return self._dispatcher.ready(worker, now), None
        return self._dispatcher.done(worker, task, now), outcome

    def _lost(self, worker: int, how: Loss, error: str, now: float, why: str | None = None) -> list[Action]:
        """Actions of the dispatcher upon the loss of a worker.

        Args:
            why: said beside it, `error` by default.
        """
        self._last_loss = error
        why = error if why is None else why
        self._say_lost(worker, how, f" ({why})" if why else "")
        self._forget(worker)
        return self._dispatcher.lost(worker, how, now)

    def _look_around(self, step: Step, by_index: dict[int, Task]) -> None:
        """Time passes, nodes get notice, and somebody may wonder why nothing happens."""
        now = time.monotonic()
        self._do(self._dispatcher.tick(now), step, by_index)
        if now - self._looked >= _TICK_SECONDS:
            self._looked = now
            self._metrics.workers(self._dispatcher)
            if self._head_answers():
                self._heard_of_head = now
                self._leaving |= _draining()
                for worker in [w for w, node in self._nodes.items() if node in self._leaving]:
                    self._do(self._dispatcher.draining(worker, now), step, by_index)
            elif now - self._heard_of_head > _GONE_SECONDS:
                gone = "the head of the Ray cluster is gone; finished shards stay: run the same command again"
                raise PassingError(f"{gone}, on this cluster or another")
        if not self._dispatcher.waiting_for_workers:
            self._said_waiting = now
        elif now - self._said_waiting >= _SAY_SECONDS:
            self._said_waiting = now
            ready, least = self._dispatcher.ready_workers, self._demand.workers.least
            have = f"{ready} of {least} to begin with" if ready else "none yet"
            self._watch.say(f"note: waiting for workers: {have}; {self.workers} of {self._demand} are asked for")

    def _head_answers(self) -> bool:
        """Whether the cluster's head is there. Workers work without it for a while, but whatever asks it hangs."""
        try:
            knock(self._head, _TICK_SECONDS)
        except OSError:
            return False
        return True

    def _say_lost(self, worker: int, how: Loss, why: str = "") -> None:
        self._watch.note("lost", worker=worker, where=self._places.get(worker, ""), how=how.value)
        self._watch.say(f"note: worker {worker} {_LOST[how]}{why}; what it had is done elsewhere")

    @property
    def lost(self) -> dict[str, int]:
        return {how.value: count for how, count in self._dispatcher.losses.items() if count}

    def _do(self, actions: Sequence[Action], step: Step, by_index: dict[int, Task]) -> list[Accept]:
        """Do what the dispatcher says; returns the results that count."""
        accepted = []
        for action in actions:
            match action:
                case Ask(worker):
                    actor = self._actors[worker] = self._remote.remote(worker)
                    arguments = self._recipe, self._out, self._sight, self._demand.slots
                    self._call(worker, None, actor.start, "fapm start", *arguments)
                case Start(worker, task, following):
                    name = f"fapm {step.__name__} shard {task}"
                    tasks = by_index[task], by_index[following] if following is not None else None
                    self._call(worker, task, self._actors[worker].run, name, step, *tasks)
                case Release(worker, lost):
                    if lost:
                        self._say_lost(worker, lost)
                    self._forget(worker)
                case Accept():
                    accepted.append(action)
                case Stop(task, why):
                    raise self._stopped(task, why)
        return accepted

    def _stopped(self, task: int | None, why: str) -> Exception:
        if task is None:
            last = f", the last so: {self._last_loss}" if self._last_loss else ""
            return PassingError(f"{why}{last}; finished shards stay: run the same command again")
        error = self._errors.get(task)
        if isinstance(error, UserError):
            return error
        if error is not None:
            error.add_note(f"in {self._names[task]}, after several tries on different workers; finished shards stay")
            return error
        return PassingError(f"{self._names[task]}: {why}; finished shards stay: run the same command again")

    def _call(self, worker: int, task: int | None, method: Any, name: str, *arguments: Any) -> None:
        self._calls[method.options(name=name).remote(*arguments)] = worker, task

    def _forget(self, worker: int) -> None:
        """Dropping the handle does not always release a worker (ray#59872)."""
        actor = self._actors.pop(worker, None)
        self._nodes.pop(worker, None)
        self._places.pop(worker, None)
        self._calls = {call: of for call, of in self._calls.items() if of[0] != worker}
        if actor is not None and self._head_answers():
            ray.kill(actor)

    def close(self) -> None:
        if not self._head_answers():
            global headless
            headless = True
            return
        self._metrics.workers(self._dispatcher)
        for actor in self._actors.values():
            ray.kill(actor)  # as in `_forget`
        if self._owns_ray:
            ray.shutdown()


@contextlib.contextmanager
def connected(address: str, recipe: Recipe, say: Callable[[str], None]) -> Iterator[None]:
    """The cluster at `address`, or a Ray of its own for the time being, where this process has none yet.

    Raises:
        UserError: it cannot be reached.
    """
    owns = not ray.is_initialized()
    if owns:
        _connect(address, recipe, say)
    try:
        yield
    finally:
        if owns:
            ray.shutdown()


def _nothing(worker: Worker, task: Task, following: Task | None) -> Done:
    raise AssertionError("there is nothing to do yet")


def _draining() -> set[str]:
    """The nodes that have got notice that they will go away."""
    from ray._private.state import state  # as Ray Data and Train ask for it: there is no public way

    try:
        return set(state.get_draining_nodes())
    except Exception:
        return set()


def _sight(plan: Plan, recipe: Recipe, out: Store) -> Sight:
    sides = zip(recipe.checkpoints, (side.identity for side in plan.inputs.values()), strict=True)
    files = {address: {name: entry["size"] for name, entry in identity.items()} for address, identity in sides}
    return Sight(files, out, out.read(RUN))


def _connect(address: str, recipe: Recipe, say: Callable[[str], None]) -> None:
    _listen_to_ray(say)
    on_terminate = signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(os.sep):  # Ray's workers look for modules where the driver is, and find what is no module
        _init(address, recipe)
    if threading.current_thread() is threading.main_thread() and on_terminate is not None:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own would end the driver with a dump of its stack


def _init(address: str, recipe: Recipe) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    check_address(address)
    try:
        if address == "local":
            wanted = (recipe.cpus_per_worker or 1) * (recipe.workers.most if recipe.workers else 1)
            ray.init(address="local", num_cpus=max(cores(), wanted), **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise UserError(f"--ray {address}: {last_line(error)}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_enter(address, error) from None
    except Exception as error:
        if type(error) is not Exception:  # so Ray says that a node of its own does not come up
            raise
        raise cannot_enter(address, error) from None


def _listen_to_ray(say: Callable[[str], None]) -> None:
    """Of what Ray would print to stdout of its nodes' troubles, say what a user can do something about.

    That a node or a worker was lost is said by the pool, without the node's log.
    """
    import ray._private.worker as inside  # there is no public way

    def heard(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for line in "\n".join(data["lines"]).splitlines():
            if "memory pressure" in line:
                say(f"note: Ray: {line.strip()}")

    if hasattr(inside, "print_to_stdstream"):
        inside.print_to_stdstream = heard


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
