"""pytest tests/pipeline/test_dispatcher.py: whatever happens, nothing is lost, nothing counts twice, and it ends."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fapm.dispatcher import Accept, Action, Ask, Dispatcher, Limits, Loss, Release, Start, Stop

USUAL = Limits()
LIMITS = Limits(crashes=1000, crashes_of_a_task=1000, failures=1000)


class World:
    """A cluster that does what a dispatcher says, and remembers it."""

    def __init__(self, wanted: int, limits: Limits = USUAL, least: int = 1, slots: int = 1):
        self.dispatcher, self.now = Dispatcher(wanted, limits, least, slots), 0.0
        self.asked: set[int] = set()
        self.alive: set[int] = set()
        self.held: set[tuple[int, int]] = set()  # worker and task
        self.following: dict[int, int] = {}
        self.accepted: list[object] = []
        self.started: list[object] = []
        self.stopped: list[Stop] = []

    def do(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            match action:
                case Ask(worker):
                    assert worker not in self.asked | self.alive
                    self.asked.add(worker)
                case Start(worker, task, following):
                    assert worker in self.alive, "only a worker that is ready gets a task"
                    assert sum(w == worker for w, _ in self.held) < self.dispatcher.slots, "it has no room"
                    assert following != task
                    assert (worker, task) not in self.held
                    self.held.add((worker, task))
                    if following is not None:
                        assert following in self.dispatcher._waiting
                        self.following[worker] = following
                    self.started.append(task)
                case Release(worker):
                    self.forget(worker)
                case Accept(_, task, tries):
                    assert task not in self.accepted, "no result counts twice"
                    assert 1 <= tries == self.started.count(task)
                    self.accepted.append(task)
                case Stop():
                    self.stopped.append(action)
        return actions

    @property
    def running(self) -> dict[int, int]:
        """Where there is one slot: the task of every worker that has one."""
        return dict(self.held)

    def forget(self, worker: int) -> None:
        self.asked.discard(worker)
        self.alive.discard(worker)
        self.held = {(w, task) for w, task in self.held if w != worker}

    def end(self, worker: int) -> int:
        """A task that the worker had."""
        held = min((w, task) for w, task in self.held if w == worker)
        self.held.remove(held)
        return held[1]

    def begin(self, tasks: int, last: bool = True) -> None:
        self.accepted, self.started = [], []
        self.do(self.dispatcher.begin(dict.fromkeys(range(tasks), 1.0), self.now, last))

    def ready(self, worker: int) -> list[Action]:
        self.asked.remove(worker)
        self.alive.add(worker)
        return self.do(self.dispatcher.ready(worker, self.now))

    def all_ready(self) -> None:
        for worker in sorted(self.asked):
            if worker in self.asked:
                self.ready(worker)

    def done(self, worker: int) -> list[Action]:
        return self.do(self.dispatcher.done(worker, self.end(worker), self.now))

    def failed(self, worker: int, **how: bool) -> list[Action]:
        return self.do(self.dispatcher.failed(worker, self.end(worker), "why", self.now, **how))

    def lost(self, worker: int, how: Loss = Loss.CRASHED) -> list[Action]:
        self.forget(worker)
        return self.do(self.dispatcher.lost(worker, how, self.now))

    def tick(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.do(self.dispatcher.tick(self.now))


def with_workers(count: int, tasks: int, limits: Limits = USUAL, last: bool = True) -> World:
    world = World(count, limits)
    world.begin(tasks, last)
    world.all_ready()
    return world


def test_all_workers_are_asked_for_at_once_and_used_as_they_come():
    world = World(3)
    world.begin(10)
    assert world.asked == {0, 1, 2}
    assert world.dispatcher.waiting_for_workers
    assert world.ready(1) == [Start(1, 0, 1)]
    assert world.done(1) == [Accept(1, 0, 1), Start(1, 1, 2)]
    assert world.ready(0) == [Start(0, 3, 4)]  # the other keeps 2
    assert not world.dispatcher.waiting_for_workers


def test_no_more_workers_than_tasks():
    world = World(8)
    world.begin(2)
    assert len(world.asked) == 2


@pytest.mark.parametrize("how", Loss)
def test_what_a_lost_worker_had_is_done_soon_and_another_worker_asked_for(how):
    world = with_workers(2, 5)
    actions = world.lost(0, how)
    assert [type(a) for a in actions] == [Ask]
    assert world.done(1)[1] == Start(1, 3, 0)  # it keeps 3, and then 0
    assert world.done(1)[1] == Start(1, 0, 1)
    assert world.dispatcher.losses[how] == 1


def test_a_draining_worker_ends_what_it_has_and_gets_nothing_new():
    world = with_workers(2, 6)
    actions = world.do(world.dispatcher.draining(0, world.now))
    assert [type(a) for a in actions] == [Ask]  # its replacement
    assert world.done(0) == [Accept(0, 0, 1), Release(0)]
    idle = with_workers(2, 6, last=False)
    while not idle.dispatcher.finished:
        idle.done(min(idle.running))
    assert idle.do(idle.dispatcher.draining(1, 0.0)) == [Release(1)]


def test_preempted_workers_use_up_no_budget():
    world = with_workers(1, 3, Limits(crashes=2, crashes_of_a_task=2))
    for _ in range(50):
        world.lost(min(world.alive), Loss.PREEMPTED)
        world.all_ready()
    assert not world.stopped
    world.lost(min(world.alive))
    world.all_ready()
    world.lost(min(world.alive))
    assert world.stopped == [Stop(0, "2 workers were lost while they had it")]


def test_no_shard_is_to_blame_for_a_device_that_fails():
    world = with_workers(1, 3, Limits(crashes=9, crashes_of_a_task=2))
    for _ in range(8):
        world.lost(min(world.alive), Loss.DEVICE)
        world.all_ready()
    assert not world.stopped
    world.lost(min(world.alive), Loss.DEVICE)
    assert world.stopped == [Stop(None, "9 workers were lost one after the other")]


def test_workers_that_are_lost_one_after_the_other_end_the_run_and_a_result_in_between_does_not():
    limits = Limits(crashes=3, crashes_of_a_task=99)
    world = with_workers(1, 9, limits)
    for _ in range(5):
        for _ in range(2):
            world.lost(min(world.alive))
            world.all_ready()
        world.done(min(world.running))
    assert not world.stopped
    for _ in range(3):
        world.lost(min(world.alive | world.asked))
        world.all_ready()
    assert [stop.task for stop in world.stopped] == [None]


def test_a_rack_of_workers_may_go_at_once():
    world = with_workers(40, 200)
    for worker in range(39):
        world.lost(worker)
    assert not world.stopped
    world.all_ready()
    while not world.dispatcher.finished:
        world.done(min(world.running))
    assert len(world.accepted) == 200


def test_a_task_that_fails_three_times_on_different_workers_stops_the_run():
    world = with_workers(3, 9)
    seen = []
    while not world.stopped:
        worker = next(w for w, task in world.running.items() if task == 0)
        seen.append(worker)
        world.failed(worker)
        others = [w for w in world.running if w not in seen]
        while not world.stopped and 0 not in world.running.values():
            world.done(others[0])
    assert world.stopped == [Stop(0, "why")]
    assert len(set(seen)) == 3


def test_a_task_that_fails_goes_to_the_only_worker_again():
    world = with_workers(1, 2)
    world.failed(0)
    assert world.running[0] in (0, 1)
    while not world.dispatcher.finished:
        world.done(0)
    assert not world.stopped


def test_a_hopeless_task_stops_the_run_at_once():
    world = with_workers(2, 9)
    assert world.failed(0, hopeless=True) == [Stop(0, "why")]


def test_a_worker_that_takes_far_too_long_is_given_up():
    world = with_workers(2, 30, Limits(hung_factor=10, hung_seconds=20))
    for _ in range(4):
        world.now += 1
        world.done(1)
    assert world.tick(5) == []
    world.done(1)
    actions = world.tick(15)
    assert Release(0, Loss.HUNG) in actions
    assert any(isinstance(a, Ask) for a in actions)
    assert world.dispatcher.losses[Loss.HUNG] == 1
    world.all_ready()
    assert 0 in world.running.values()  # the task, on another worker


def test_nobody_is_given_up_while_there_is_nothing_to_compare_with():
    world = with_workers(2, 4, Limits(unknown_seconds=1000))
    assert world.tick(999) == []
    assert len([a for a in world.tick(2) if isinstance(a, Release)]) == 2


def test_the_last_task_is_given_to_a_second_worker_and_the_first_result_counts():
    world = with_workers(2, 4, Limits(slow_factor=2, slow_seconds=5))
    for _ in range(3):
        world.now += 1
        world.done(1)
    assert set(world.running) == {0}
    assert world.tick(1) == []
    assert world.tick(10) == [Start(1, 0, None)]
    assert world.tick(10) == []  # not a third time
    actions = world.done(1)
    assert actions[0] == Accept(1, 0, 2)
    assert Release(0) in actions
    assert world.dispatcher.finished


def test_what_a_beaten_worker_says_afterwards_counts_for_nothing():
    world = with_workers(2, 2)
    world.now += 1
    world.done(1)
    world.tick(100)
    world.done(0)
    assert world.dispatcher.finished
    assert world.do(world.dispatcher.done(1, 0, world.now)) == []


def test_at_the_end_of_the_last_step_idle_and_pending_workers_are_let_go_but_one():
    world = World(6)
    world.begin(6)
    for worker in range(4):
        world.ready(worker)
    for worker in (0, 1):
        world.done(worker)
    assert world.asked == set()
    assert len(world.alive) == 4
    world.done(2)
    assert len(world.alive - set(world.running)) <= 1


def test_between_two_steps_workers_stay():
    world = with_workers(3, 3, last=False)
    for worker in (0, 1, 2):
        world.done(worker)
    assert world.alive == {0, 1, 2}
    world.begin(3)
    assert set(world.running) == {0, 1, 2}


def test_what_a_worker_keeps_is_taken_by_others_only_at_the_end():
    world = with_workers(2, 6)
    for _ in range(3):
        for worker in (0, 1):
            kept = world.following.pop(worker, None)
            world.done(worker)
            assert kept is None or world.running[worker] == kept
    world = with_workers(2, 4)
    assert world.running == {0: 0, 1: 2}
    assert world.following == {0: 1, 1: 3}
    world.done(0)
    world.done(0)
    assert world.running[0] == 3  # nothing else was waiting


def test_a_worker_gets_what_it_did_in_the_step_before_its_last_first():
    world = with_workers(2, 6, last=False)
    did: dict[int, list[int]] = {0: [], 1: []}
    for worker in (0, 1, 1, 0, 1, 0):
        did[worker].append(world.running[worker])
        world.done(worker)
    world.begin(6)
    again: dict[int, list[int]] = {0: [], 1: []}
    for worker in (0, 1, 1, 0, 1, 0):
        again[worker].append(world.running[worker])
        world.done(worker)
    assert again == {0: did[0][::-1], 1: did[1][::-1]}


def test_what_a_worker_kept_that_is_lost_or_leaving_is_free_again():
    for change in (lambda w: w.lost(0), lambda w: w.do(w.dispatcher.draining(0, 0.0))):
        world = with_workers(2, 9)
        kept = world.following[0]
        change(world)
        while kept not in world.running.values():
            world.done(1)
        assert world.dispatcher._waiting


def test_a_worker_with_slots_has_as_many_tasks_and_the_others_their_share():
    world = World(2, slots=3)
    world.begin(20)
    world.all_ready()
    assert sorted(w for w, _ in world.held) == [0, 0, 0, 1, 1, 1]
    world.lost(0)
    assert sorted(w for w, _ in world.held) == [1, 1, 1]
    while not world.dispatcher.finished:
        world.done(1)
    assert sorted(world.accepted) == list(range(20))
    few = World(5, slots=3)
    few.begin(4)
    few.all_ready()
    assert sorted(w for w, _ in few.held) == [0, 0, 0, 1]


def test_the_first_task_waits_for_the_least_number_of_workers_and_later_ones_do_not():
    world = World(4, least=2)
    world.begin(9)
    assert world.ready(3) == []
    assert world.dispatcher.waiting_for_workers
    assert {type(a) for a in world.ready(1)} == {Start}
    assert world.running.keys() == {1, 3}
    world.lost(3)
    assert [type(a) for a in world.done(1)] == [Accept, Start]
    assert not world.dispatcher.waiting_for_workers


def test_no_more_workers_are_waited_for_than_there_are_tasks():
    world = World(8, least=5)
    world.begin(2)
    world.all_ready()
    assert len(world.running) == 2


def test_a_beaten_worker_with_other_tasks_keeps_them_and_what_is_done_is_not_begun_again():
    world = World(2, slots=2)
    world.begin(3)
    world.all_ready()
    world.now += 1
    world.done(1)
    assert sorted(world.held) == [(0, 0), (0, 1)]
    world.tick(100)
    beaten = next(task for w, task in world.held if w == 1)
    actions = world.done(1)
    assert actions[0] == Accept(1, beaten, 2)
    assert not any(isinstance(action, Release) for action in actions)
    for _ in range(3):
        world.tick(1)
    assert world.started.count(beaten) == 2
    assert sorted(world.held) == [(0, 0), (0, 1), (1, 1 - beaten)]


class AnythingHappens(RuleBasedStateMachine):
    """Losses, readiness, results and time in any order."""

    @initialize(
        wanted=st.integers(1, 5), tasks=st.integers(0, 12), last=st.booleans(), least=st.integers(1, 6),
        slots=st.integers(1, 3),
    )  # fmt: skip
    def start(self, wanted: int, tasks: int, last: bool, least: int, slots: int) -> None:
        self.world, self.tasks = World(wanted, LIMITS, least, slots), tasks
        self.world.begin(tasks, last)

    @precondition(lambda self: self.world.asked)
    @rule(data=st.data())
    def a_worker_is_ready(self, data: st.DataObject) -> None:
        self.world.ready(data.draw(st.sampled_from(sorted(self.world.asked))))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), seconds=st.floats(0, 50))
    def a_result(self, data: st.DataObject, seconds: float) -> None:
        self.world.now += seconds
        self.world.done(data.draw(st.sampled_from(sorted(self.world.running))))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def a_failure(self, data: st.DataObject) -> None:
        self.world.failed(data.draw(st.sampled_from(sorted(self.world.running))))

    @precondition(lambda self: self.world.alive | self.world.asked)
    @rule(data=st.data(), how=st.sampled_from([Loss.CRASHED, Loss.PREEMPTED]))
    def a_loss(self, data: st.DataObject, how: Loss) -> None:
        self.world.lost(data.draw(st.sampled_from(sorted(self.world.alive | self.world.asked))), how)

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data())
    def a_notice(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.world.alive)))
        self.world.do(self.world.dispatcher.draining(worker, self.world.now))

    @rule(seconds=st.floats(0, 5000))
    def time_passes(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(worker=st.integers(0, 60), task=st.integers(0, 12))
    def somebody_unknown_speaks(self, worker: int, task: int) -> None:
        if worker not in self.world.alive | self.world.asked:
            self.world.do(self.world.dispatcher.lost(worker, Loss.CRASHED, self.world.now))
            assert not self.world.stopped

    @invariant()
    def nothing_is_lost(self) -> None:
        waiting = set(self.world.dispatcher._waiting)
        assert waiting | {task for _, task in self.world.held} | set(self.world.accepted) >= set(range(self.tasks))
        assert not waiting & set(self.world.accepted)
        assert len(self.world.alive | self.world.asked) <= 3 * self.world.dispatcher.wanted + self.tasks

    @invariant()
    def a_worker_is_there_or_coming_while_there_is_work(self) -> None:
        assert self.world.dispatcher.finished or self.world.alive | self.world.asked

    def teardown(self) -> None:
        """However it was left, it comes to an end when workers work."""
        if not hasattr(self, "world"):
            return
        for _ in range(10 * self.tasks + 50):
            if self.world.dispatcher.finished:
                break
            if self.world.running:
                self.world.done(min(self.world.running))
            else:
                self.world.all_ready()
        assert self.world.dispatcher.finished
        assert sorted(self.world.accepted) == list(range(self.tasks))
        assert not self.world.stopped


AnythingHappens.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestAnythingHappens = AnythingHappens.TestCase
