"""Sharing a stream of tasks among processes.

    with Crew(make, num_workers) as crew:
        for result in crew.map(tasks): ...        # worker.run(task), in the order of the tasks
        worker = crew.finish()                    # this process's worker, all others' worker.finish() joined to it

make() builds one worker in every process; it and the tasks, results and exceptions are pickled. This process works too,
so num_workers=1 starts nothing and small jobs end before a started process is ready.

Processes are fresh interpreters that get what they need by descriptors of their own, not multiprocessing's: fork copies
locks that other threads hold, spawn runs the user's script again unless it is guarded, and neither is allowed inside
the daemonic processes of a DataLoader. Nor by standard input and output, which belong to whatever runs at an
interpreter's start.

A task and then its result lie in a file in memory, a slot. Pipes carry no more than the slots' numbers, so that nobody
waits for a reader, and no thread of this process is needed to be one:

    this process ── task's slot ──► one pipe ──► whichever process is free, this one too
    this process ◄── result's slot ── a pipe of each process

The first pipe ends with this process, and then the others end too; a process's own ends with it.
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain, islice
from typing import IO, Any, Protocol

import numpy as np

# -P: nothing is imported from the current folder just because it is the current one.
_BOOT = (
    "-P",
    "-c",
    "import mmap, pickle, sys; given = mmap.mmap(int(sys.argv[1]), 0, access=mmap.ACCESS_READ); "
    f"sys.path[:] = pickle.load(given); from {__name__} import _serve; _serve(given, *map(int, sys.argv[2:]))",
)
# Seconds of waiting for a result, after which the processes are looked at.
_PATIENCE = 1.0
# A slot's number in a pipe: so few bytes are written and read whole.
_NUMBER = struct.Struct("=I")
# Stands for a slot's number: there are no more tasks.
_LAST = (1 << 32) - 1


class WorkerError(ChildProcessError, RuntimeError):
    """A process died. An OSError too, as all errors are that a command line answers in one sentence."""


class Worker(Protocol):
    """Those of a crew that calls finish() also have finish() -> final and join(final)."""

    def run(self, task: Any) -> Any: ...


def default_num_workers() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_num_workers(num_workers: int | None) -> int:
    """`num_workers`, or the default for None. Raises ValueError when it is no positive integer."""
    if num_workers is None:
        return default_num_workers()
    if not isinstance(num_workers, int | np.integer) or isinstance(num_workers, bool) or num_workers < 1:
        raise ValueError(f"num_workers: got {num_workers!r}, expected a positive integer or None")
    return int(num_workers)


class Crew:
    """num_workers processes, this one among them. Leaving the `with` block ends them all, whatever happened.

    An exception in a worker is raised here; a process that dies is a WorkerError that says how.
    """

    def __init__(self, make: Callable[[], Any], num_workers: int) -> None:
        _keep_freed_memory()
        self._make = make
        # Each takes three descriptors, together at most three quarters of those that this process may have.
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = num_workers if most == resource.RLIM_INFINITY else most // 4
        self._n_processes = min(num_workers - 1, most) if sys.executable else 0
        self._worker: Any = None
        self._processes: dict[int, _Process] = {}  # by their pipe's end here
        self._slots: list[IO[bytes]] = []
        self._free: list[int] = []
        self._given: dict[int, tuple[int, Any]] = {}  # by slot: the task's number, and the task
        self._open = ExitStack()
        self._poll = select.poll()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        self._open.close()

    @property
    def pids(self) -> list[int]:
        """The started processes, without this one."""
        return [process.pid for process in self._processes.values()]

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """worker.run(task) for each task, in order. Tasks are taken as they are needed, a few ahead.

        If there is a second task, the others are started before the first is done. Tasks are laid out for them, two
        each and two more, and whoever is free takes the oldest. This process does those for which there is no slot, and
        in the end what nobody has begun. Results that come early wait in `done` for their turn. A worker that counts
        its tasks, alone:

        >>> class Numbering:
        ...     def __init__(self): self.n = 0
        ...     def run(self, task): self.n += 1; return task, self.n
        >>> with Crew(Numbering, 1) as crew:
        ...     list(crew.map("abc")), crew.finish().n
        ([('a', 1), ('b', 2), ('c', 3)], 3)
        """
        numbered = enumerate(tasks)
        first = list(islice(numbered, 2))
        if len(first) == 2 and self._n_processes and not self._processes:
            self._start()
        left = chain(first, numbered)
        done: dict[int, Any] = {}
        due = 0
        while True:
            self._collect(done, wait=False)
            while self._free and (task := next(left, None)):
                self._lay_out(*task)
            if due in done:
                yield done.pop(due)
                due += 1
                continue
            task = next(left, None) if len(done) <= 8 * self._n_processes + 8 else None
            if task := task or self._take_back():
                done[task[0]] = self._own_worker().run(task[1])
            elif self._given:
                self._collect(done, wait=True)
            else:
                return

    def finish(self) -> Any:
        """This process's worker, after worker.join(final) for the worker.finish() of every other that ran a task."""
        worker = self._own_worker()
        if self._processes:
            # To each process: who has run a task answers once more, and ends. (The pipe's end would say so too, but not
            # while a process that another thread forked meanwhile has a copy of it.)
            self._queue.write(_NUMBER.pack(_LAST) * len(self._processes))
        waiting = {process.pid for process in self._processes.values() if process.has_run}
        for end, process in self._processes.items():
            if not process.has_run:
                self._poll.unregister(end)
        while waiting:
            for process, _, final in self._answers(wait=True):
                worker.join(final)
                waiting.discard(process.pid)
                self._poll.unregister(process.end)
        return worker

    def _own_worker(self) -> Any:
        if self._worker is None:
            self._worker = self._make()
        return self._worker

    def _start(self) -> None:
        enter = self._open.enter_context
        while enter(os.fdopen(os.open(os.devnull, os.O_RDONLY))).fileno() <= 2:
            pass  # where standard files are closed, none of ours may be one: a process's own would replace it
        given = enter(_memory())
        # The current folder, as an interactive interpreter has it first, last.
        _put(given, [*filter(None, sys.path), *([os.getcwd()] if "" in sys.path else [])], self._make)
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._queue_end, self._queue = enter(os.fdopen(read, "rb", 0)), enter(os.fdopen(write, "wb", 0))
        self._slots = [enter(_memory()) for _ in range(2 * self._n_processes + 2)]
        self._free = list(range(len(self._slots)))
        shared = [given.fileno(), read, *[slot.fileno() for slot in self._slots]]
        for number in range(self._n_processes):
            process = _Process(number, shared)
            self._processes[process.end] = process
            self._poll.register(process.end, select.POLLIN)

    def _lay_out(self, number: int, task: Any) -> None:
        slot = self._free.pop()
        _put(self._slots[slot], task)
        self._given[slot] = number, task
        self._queue.write(_NUMBER.pack(slot))

    def _take_back(self) -> tuple[int, Any] | None:
        """The oldest task that nobody has begun, with its number."""
        if not (self._given and (found := self._queue_end.read(_NUMBER.size))):
            return None
        (slot,) = _NUMBER.unpack(found)
        self._free.append(slot)
        return self._given.pop(slot)

    def _collect(self, done: dict[int, Any], wait: bool) -> None:
        for process, slot, result in self._answers(wait):
            process.has_run = True
            self._free.append(slot)
            done[self._given.pop(slot)[0]] = result

    def _answers(self, wait: bool) -> Iterator[tuple[_Process, int, Any]]:
        """The results there are, of which process and in which slot; with `wait`, those of the next moment."""
        while not (ready := self._poll.poll(1000 * _PATIENCE if wait else 0)) and wait:
            for process in self._processes.values():
                process.wake()
        for end, _ in ready:
            process = self._processes[end]
            if not (found := os.read(end, 1 << 12)):
                raise WorkerError(f"worker process {process.pid} {process.fate()}")
            for (slot,) in _NUMBER.iter_unpack(found):
                result = _take(self._slots[slot])
                if isinstance(result, BaseException):
                    raise result
                yield process, slot, result


class _Process:
    """A fresh interpreter. end: of its pipe, in this process."""

    def __init__(self, number: int, shared: list[int]) -> None:
        # The other end is the process's alone, so that its end is seen here.
        self.end, results = os.pipe()
        try:
            # A session of its own, so that Ctrl-C reaches this process alone, which then ends the others. One thread
            # for numpy's linear algebra, which is not used. What is printed goes to standard error.
            self._popen = subprocess.Popen(
                [sys.executable, *_BOOT, *map(str, (shared[0], number, results, *shared[1:]))],
                stdin=subprocess.DEVNULL,
                stdout=2 if sys.__stderr__ else subprocess.DEVNULL,
                pass_fds=(*shared, results),
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        except BaseException:
            os.close(self.end)
            raise
        finally:
            os.close(results)
        self.pid = self._popen.pid
        self.has_run = False

    def fate(self) -> str:
        try:
            code = self._popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def wake(self) -> None:
        """Lets the process go on if somebody stopped it (SIGSTOP): nobody else would."""
        self._popen.send_signal(signal.SIGCONT)  # nothing to one that runs

    def kill(self) -> None:
        self._popen.kill()

    def join(self) -> None:
        self._popen.wait()
        os.close(self.end)


def _serve(given: mmap.mmap, number: int, results: int, queue: int, *descriptors: int) -> None:
    """The other end of _Process: runs in the fresh interpreter until there are no more tasks."""
    _keep_freed_memory()
    make = pickle.load(given)
    slots = [os.fdopen(descriptor, "wb") for descriptor in descriptors]
    poll = select.poll()
    poll.register(queue, select.POLLIN)
    worker = None
    while True:
        poll.poll()
        try:
            found = os.read(queue, _NUMBER.size)
        except BlockingIOError:
            continue  # another was faster
        if not found:
            return  # the parent is gone
        (slot,) = _NUMBER.unpack(found)
        if is_last := slot == _LAST:
            if worker is None:
                return
            slot = number
        try:
            if worker is None:
                worker = make()
            _put(slots[slot], worker.finish() if is_last else worker.run(_take(slots[slot])))
        except Exception as error:
            _put(slots[slot], _picklable(error))
        try:
            os.write(results, _NUMBER.pack(slot))
        except BrokenPipeError:
            os._exit(1)  # the parent is gone; no traceback for it
        if is_last:
            return


def _memory() -> IO[bytes]:
    """A file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):
            return os.fdopen(os.memfd_create("rooflight"), "wb")
    from tempfile import TemporaryFile

    return TemporaryFile("wb")


def _put(file: IO[bytes], *contents: Any) -> None:
    # The place in the file is the same in all processes, so that it is not where this one left it.
    file.seek(0)
    for content in contents:
        pickle.dump(content, file, pickle.HIGHEST_PROTOCOL)
    file.flush()


def _take(file: IO[bytes]) -> Any:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        return pickle.loads(memory)


def _keep_freed_memory() -> None:
    """Lets malloc reuse what arrays of a chunk leave, instead of asking the kernel for new pages each time.

    glibc gives freed memory back above a threshold, at first 128 KB, which rises to the largest mapped block freed so
    far, at most 32 MB. This block is never touched, so it costs nothing. Other C libraries take no notice.
    """
    np.empty((1 << 25) - (1 << 16), np.uint8)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return WorkerError(f"{type(error).__name__}: {error}")
