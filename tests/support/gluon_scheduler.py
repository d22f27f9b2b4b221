"""Who runs in an emulated Gluon program: partitions hand over to each other, asynchronous work happens in between."""

from __future__ import annotations

import itertools
import linecache
import random
import sys
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.gluon_hardware import Barrier, Mma, Shared, Transfer


class EmulationError(AssertionError):
    """The kernel did what the hardware does not forgive."""


class DeadlockError(EmulationError):
    """Nobody can go on."""


class RaceError(EmulationError):
    """The result depends on timing."""


class ProtocolError(EmulationError):
    """A barrier or an asynchronous operation was used against its rules."""


class _Stop(BaseException):
    """Another partition failed."""


# ---------------------------------------------------------------- who runs


class Partition:
    def __init__(self, name: str) -> None:
        self.name = name
        self.go: SimpleQueue[None] = SimpleQueue()  # a semaphore, without the time that threading's takes
        self.is_done = False
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.polls = False  # it only looks at global memory, again and again
        self.mmas: list[Mma] = []  # in flight, oldest first
        self.stores: list[Transfer] = []  # still to read shared memory
        self.writes: list[Transfer] = []  # still to reach global memory

    def check_idle(self) -> None:
        """The end of the partition: of its own only writes to global memory may be in flight."""
        if self.mmas or self.stores:
            mmas, stores = len(self.mmas), len(self.stores)
            raise ProtocolError(f"{self.name} ended with {mmas} wgmmas and {stores} TMA stores in flight")

    def write_all(self) -> None:
        while self.writes:
            self.writes[0].happen()


class Machine:
    """The programs that run side by side, of which one partition runs at a time."""

    def __init__(self) -> None:
        self.programs: list[Program] = []
        self.failure: BaseException | None = None
        self.polls = 0  # since anything else happened

    def run(self, programs: Iterable[Program], resident: int, body: Callable[[Program], None]) -> None:
        """body(program) for each program, `resident` at a time, started in their order."""
        waiting, done = iter(programs), threading.Semaphore(0)

        def enter(program: Program) -> None:
            program.machine = self
            self.programs.append(program)
            threading.Thread(target=life, args=(program, program.running), daemon=True).start()

        def life(program: Program, me: Partition) -> None:
            me.go.get()
            try:
                if self.failure is None:
                    body(program)
                    me.is_done = True
                    self.programs.remove(program)
                    for newcomer in itertools.islice(waiting, 1):
                        enter(newcomer)
                    if self.programs:
                        program.hand_over(me)
                    else:
                        done.release()
            except _Stop:
                pass
            except BaseException as error:
                self.fail(error)
            if self.failure is not None:
                done.release()

        for program in itertools.islice(waiting, resident):
            enter(program)
        if self.programs:
            self.programs[0].running.go.put(None)
            done.acquire()
        if self.failure is not None:
            raise self.failure

    def fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            for program in self.programs:
                for partition in program.partitions:
                    partition.go.put(None)


class Program:
    """One program of the grid: its partitions, its memory, what is in flight."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], seed: str) -> None:
        self.machine = Machine()
        self.index, self.grid = index, grid
        self.random = random.Random(seed)
        # How soon asynchronous work happens, and how long a partition keeps running, differ from run to run.
        self.eagerness = self.random.choice((0.02, 0.3, 0.9))
        self.stickiness = self.random.choice((0.0, 0.5, 0.95))
        self.running = Partition("the program")
        self.partitions = [self.running]
        self.loads: list[Transfer] = []
        self.memory: list[Shared] = []
        self.barriers: list[Barrier] = []

    def _in_flight(self, stragglers: bool) -> list[Callable[[], None]]:
        """What the hardware could do next: wgmmas of one partition and its stores read in order, the rest is in any."""
        actions = [load.happen for load in self.loads if stragglers or not load.is_late]
        for partition in self.partitions:
            actions += [m.happen for m in partition.mmas if m.result is None][:1]
            actions += [s.happen for s in partition.stores][:1]
            actions += [write.happen for write in partition.writes if stragglers or not write.is_late]
        return actions

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "", polls: bool = False) -> None:
        """Let others run; come back once `ready`. `polls`: nothing happened but a look at global memory."""
        me = self.running
        me.ready, me.waits_for, me.polls = ready, waits_for, polls
        self.machine.polls = self.machine.polls + 1 if polls else 0
        self.hand_over(me)
        me.ready, me.waits_for, me.polls = lambda: True, "", False

    def hand_over(self, me: Partition) -> None:
        """Choose who runs; unless that is `me`, or `me` is done, come back when chosen again."""
        program, chosen = self._next(me)
        program.running = chosen
        if chosen is not me:
            chosen.go.put(None)
            if not me.is_done:
                me.go.get()
                if self.machine.failure is not None:
                    raise _Stop

    def _next(self, me: Partition) -> tuple[Program, Partition]:
        while True:
            able = [(x, p) for x in self.machine.programs for p in x.partitions if not p.is_done and p.ready()]
            polls = self.machine.polls if all(p.polls for _, p in able) else 0
            stuck = not able or polls > 10
            actions = [action for program in self.machine.programs for action in program._in_flight(stuck)]
            if actions and (stuck or self.random.random() < self.eagerness):
                self.machine.polls = 0
                self.random.choice(actions)()
            elif not able or polls > 100 * len(able):
                waiting = [
                    f"{p.name} waits for {p.waits_for or 'global memory'}"
                    for program in self.machine.programs
                    for p in program.partitions
                    if not p.is_done
                ]
                raise DeadlockError("; ".join(waiting))
            elif (self, me) in able and not polls and self.random.random() < self.stickiness:
                return self, me
            else:
                return self.random.choice(able)

    def specialize(self, functions: list[tuple[Callable[..., Any], tuple[Any, ...]]], *_: Any) -> None:
        """gl.warp_specialize: run every partition to its end."""
        parent = self.running
        children = [Partition(f"partition {i} ({function.__name__})") for i, (function, _) in enumerate(functions)]

        def body(partition: Partition, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
            partition.go.get()
            try:
                if self.machine.failure is None:
                    current.program = self
                    function(*args)
                    self._finish(partition)
            except _Stop:
                pass
            except BaseException as error:
                error.add_note(f"in {partition.name} of program {self.index}")
                self.machine.fail(error)

        threads = [
            threading.Thread(target=body, args=(child, *pair), daemon=True)
            for child, pair in zip(children, functions, strict=True)
        ]
        self.partitions = children
        for thread in threads:
            thread.start()
        self.running = self.random.choice(children)
        self.running.go.put(None)
        for thread in threads:
            thread.join()
        if self.machine.failure is not None:
            raise _Stop
        for child in children:
            child.write_all()
        self.partitions, self.running = [parent], parent

    def _finish(self, partition: Partition) -> None:
        partition.check_idle()
        partition.is_done = True
        if not all(p.is_done for p in self.partitions):
            self.hand_over(partition)

    def finish(self) -> None:
        """The end of the program: nothing may be left in flight."""
        self.running.check_idle()
        self.running.write_all()
        for barrier in self.barriers:
            if barrier.bytes:
                raise ProtocolError(f"{barrier.name} still expects {barrier.bytes} bytes at the end of the program")
        if self.loads:
            raise ProtocolError(f"the program ends while {self.loads[0].what} is in flight")


current = threading.local()


def current_program() -> Program:
    return current.program


def name_of_allocation() -> str:
    """What the kernel calls what it allocates: the left side of the assignment outside every helper."""
    frame: Any = sys._getframe(1)
    line = ""
    while frame is not None and frame.f_code.co_name != "run_program":
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if frame.f_back is not None and frame.f_back.f_code.co_name == "run_program":
            break
        frame = frame.f_back
    return line.split("=")[0].strip() if "=" in line.split("(")[0] else line
