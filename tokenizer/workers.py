"""Sharing a stream of tasks among processes.

    with Crew(make, num_workers) as crew:
        for result in crew.map(tasks): ...        # worker.run(task), in the order of the tasks
        worker = crew.finish()                    # this process's worker, all others' worker.finish() joined to it

make() builds one worker in every process; it and the tasks, results and exceptions are pickled. This process works too,
so num_workers=1 starts nothing and small jobs end before a started process is ready.

Processes are fresh interpreters that talk through pipes of their own, not multiprocessing's: fork copies locks that
other threads hold, spawn runs the user's script again unless it is guarded, and neither is allowed inside the daemonic
processes of a DataLoader. Nor through standard input and output, which belong to whatever runs at an interpreter's
start. A process whose pipe ends, because its parent is gone, ends too.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import IO, Any, Protocol

import numpy as np

# -P: nothing is imported from the current folder just because it is the current one.
_BOOT = (
    "-P",
    "-c",
    "import sys, pickle; tasks, results = (open(int(fd), mode) for fd, mode in zip(sys.argv[1:], ('rb', 'wb'))); "
    f"sys.path[:] = pickle.load(tasks); from {__name__} import _serve; _serve(tasks, results)",
)
_FINISH = object()
# Seconds of waiting for a result, after which the processes are looked at.
_PATIENCE = 1.0


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
        self._n_processes = num_workers - 1 if sys.executable else 0
        self._worker: Any = None
        self._processes: list[_Process] = []
        self._tasks: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    @property
    def pids(self) -> list[int]:
        """The started processes, without this one."""
        return [process.pid for process in self._processes]

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """worker.run(task) for each task, in order. Tasks are taken as they are needed, a few ahead.

        The first task is done here; the second starts the others, which are sent one task each and one to wait. Results
        that come early wait in `done` for their turn. A worker that counts its tasks, alone:

        >>> class Numbering:
        ...     def __init__(self): self.n = 0
        ...     def run(self, task): self.n += 1; return task, self.n
        >>> with Crew(Numbering, 1) as crew:
        ...     list(crew.map("abc")), crew.finish().n
        ([('a', 1), ('b', 2), ('c', 3)], 3)
        """
        done: dict[int, Any] = {}
        taken = given = 0
        for task in tasks:
            if self._n_processes and taken and not self._processes:  # a second task: worth starting processes
                self._processes = [_Process(self._make, self._tasks, self._results) for _ in range(self._n_processes)]
            # One task in hand and one waiting for each process; what is more is done here.
            if self._processes and self._tasks.qsize() < self._n_processes:
                self._tasks.put((taken, task))
            else:
                done[taken] = self._run(task)
            taken += 1
            self._collect(done, wait=len(done) > 8 * self._n_processes + 8 and given not in done)
            while given in done:
                yield done.pop(given)
                given += 1
        while given < taken:
            try:
                index, task = self._tasks.get_nowait()
            except queue.Empty:
                self._collect(done, wait=given not in done)
            else:
                done[index] = self._run(task)
                self._collect(done, wait=False)
            while given in done:
                yield done.pop(given)
                given += 1

    def finish(self) -> Any:
        """This process's worker, after worker.join(final) for the worker.finish() of every other that ran a task.

        One at a time, so that no more than one of them is in memory.
        """
        worker = self._own_worker()
        for _ in self._processes:
            self._tasks.put((0, _FINISH))
        waiting = {process.pid for process in self._processes if process.has_run}
        while waiting:
            pid, final = self._next()
            worker.join(final)
            waiting.discard(pid)
        return worker

    def _own_worker(self) -> Any:
        if self._worker is None:
            self._worker = self._make()
        return self._worker

    def _run(self, task: Any) -> Any:
        return self._own_worker().run(task)

    def _collect(self, done: dict[int, Any], wait: bool) -> None:
        while wait or not self._results.empty():
            index, result = self._next()
            done[index] = result
            wait = False

    def _next(self) -> tuple[int, Any]:
        """The next result there is, or will be."""
        while True:
            with suppress(queue.Empty):
                index, result = self._results.get(timeout=_PATIENCE)
                break
            for process in self._processes:
                process.wake()
        if isinstance(result, BaseException):
            raise result
        return index, result


class _Process:
    """A fresh interpreter, and the thread that passes it tasks and takes its results."""

    def __init__(self, make: Callable[[], Worker], tasks: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
        # Both pipes' other ends are the process's alone, so that each side sees when the other is gone.
        read_tasks, write_tasks = os.pipe()
        read_results, write_results = os.pipe()
        self._input, self._output = os.fdopen(write_tasks, "wb"), os.fdopen(read_results, "rb")
        try:
            # A session of its own, so that Ctrl-C reaches this process alone, which then ends the others. One thread
            # for numpy's linear algebra, which is not used. What is printed goes to standard error.
            self._popen = subprocess.Popen(
                [sys.executable, *_BOOT, str(read_tasks), str(write_results)],
                stdin=subprocess.DEVNULL,
                stdout=2 if sys.__stderr__ else subprocess.DEVNULL,
                pass_fds=(read_tasks, write_results),
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        except BaseException:
            self._input.close()
            self._output.close()
            raise
        finally:
            os.close(read_tasks)
            os.close(write_results)
        self.pid = self._popen.pid
        self._make, self._tasks, self._results = make, tasks, results
        self.has_run = False
        self._ending = False
        self._thread = threading.Thread(target=self._feed, name=f"feeds process {self.pid}", daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        index = -1
        try:
            # The current folder, as an interactive interpreter has it first, last.
            self._send([*filter(None, sys.path), *([os.getcwd()] if "" in sys.path else [])])
            self._send(self._make)
            pickle.load(self._output)  # ready: until then tasks are left to others
            while True:
                index, task = self._tasks.get()
                if self._ending:
                    return
                self._send(None if task is _FINISH else (task,))
                result = pickle.load(self._output)
                if task is _FINISH:
                    self._results.put((self.pid, result))
                    return
                self.has_run = True
                self._results.put((index, result))
        except (EOFError, OSError, pickle.UnpicklingError):
            if not self._ending:
                self._results.put((index, WorkerError(f"worker process {self.pid} {self._fate()}")))
        except BaseException as error:
            self._results.put((index, error))

    def _send(self, message: Any) -> None:
        pickle.dump(message, self._input, pickle.HIGHEST_PROTOCOL)
        self._input.flush()

    def _fate(self) -> str:
        try:
            code = self._popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def wake(self) -> None:
        """Lets the process go on if somebody stopped it (SIGSTOP): nobody else would."""
        with suppress(ChildProcessError):  # ended, and waited for
            if os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG):
                self._popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._ending = True
        self._popen.kill()
        self._tasks.put((-1, _FINISH))  # wakes the thread if it waits for a task

    def join(self) -> None:
        self._popen.wait()
        self._thread.join()
        for pipe in (self._input, self._output):
            with suppress(OSError):  # unsent bytes, for a process that is gone
                pipe.close()


def _serve(tasks: IO[bytes], results: IO[bytes]) -> None:
    """The other end of _Process: runs in the fresh interpreter until its tasks end."""
    _keep_freed_memory()
    try:
        make = pickle.load(tasks)
        worker = None
        results.write(pickle.dumps("ready"))
        results.flush()
        while True:
            message = pickle.load(tasks)
            try:
                worker = worker or make()
                result = worker.finish() if message is None else worker.run(*message)
                answer = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                answer = _pickled(error)
            results.write(answer)
            results.flush()
            if message is None:
                return
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the parent is gone; no traceback for it


def _keep_freed_memory() -> None:
    """Lets malloc reuse what arrays of a chunk leave, instead of asking the kernel for new pages each time.

    glibc gives freed memory back above a threshold, at first 128 KB, which rises to the largest mapped block freed so
    far, at most 32 MB. This block is never touched, so it costs nothing. Other C libraries take no notice.
    """
    np.empty((1 << 25) - (1 << 16), np.uint8)


def _pickled(error: Exception) -> bytes:
    try:
        answer = pickle.dumps(error)
        pickle.loads(answer)
        return answer
    except Exception:
        return pickle.dumps(WorkerError(f"{type(error).__name__}: {error}"))
