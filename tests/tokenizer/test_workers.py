"""The crew: order, errors, killed processes, no orphans, no trouble inside other process pools."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest

from rooflight.tokenizer.workers import Crew, check_num_workers

# Workers must be importable in a fresh process, which knows nothing of this file: what they do is given as source.
HELPER = """
import os, signal, time
class Helper:
    def __init__(self, start=0, naps=False): self.total, self.naps = start, naps
    def run(self, task):
        kind, value = task
        self.total += 1
        if kind == "kill" and os.getpid() != value: os.kill(os.getpid(), signal.SIGKILL)
        if kind == "fail" and os.getpid() != value: raise OSError(f"cannot read chunk {value}")
        if kind == "secret" and os.getpid() != value:
            class Secret(Exception): pass
            raise Secret("cannot be pickled")
        if kind == "lambda" and os.getpid() != value: return lambda: None
        if kind == "exit" and os.getpid() != value: os._exit(3)
        if kind == "sleep": time.sleep(value)
        if kind == "double": time.sleep(0.02); return 2 * value, os.getpid()
        return value, os.getpid()
    def finish(self):
        if self.naps: time.sleep(os.getpid() % 4 / 2)  # one ends before the other
        return self.total
    def join(self, total): self.total += total
"""


@pytest.fixture
def helper(tmp_path, monkeypatch):
    (tmp_path / "crew_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    import crew_helper

    yield crew_helper.Helper
    del sys.modules["crew_helper"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_in_order_from_every_process(helper):
    tasks = [("sleep", 0.02 + 0.01 * (i % 3)) for i in range(60)]
    with Crew(helper, 3) as crew:
        results = list(crew.map(tasks))
        pids = crew.pids
        total = crew.finish().total
    assert [value for value, _ in results] == [value for _, value in tasks]
    assert Counter(pid for _, pid in results).keys() <= {os.getpid(), *pids}
    assert total == 60
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_tasks_and_results_of_megabytes_pass_where_there_are_no_files_in_memory_too(helper, monkeypatch):
    for missing in (False, True):
        if missing:
            monkeypatch.delattr(os, "memfd_create")
        open_before = len(os.listdir("/proc/self/fd"))
        tasks = 400 * [("double", bytes([i]) * (i % 3 << 20)) for i in range(5)]
        from_others = 0
        with Crew(helper, 3) as crew:
            for (_, value), (result, pid) in zip(tasks, crew.map(tasks), strict=False):
                assert result == 2 * value
                from_others += pid != os.getpid()
                if from_others == 20:
                    break
        assert from_others == 20
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_what_no_started_process_has_begun_is_done_here(helper):
    """A process needs a tenth of a second at the least to start: these are done, and counted, before."""
    with Crew(helper, 3) as crew:
        results = list(crew.map([("none", i) for i in range(6)]))
        assert results == [(i, os.getpid()) for i in range(6)]
        assert len(crew.pids) == 2
        assert crew.finish().total == 6
    with Crew(helper, 2) as crew:  # one that is ready by now, and one that has come to nothing
        assert len(list(crew.map([("sleep", 0.02)] * 60))) == 60
        assert crew.finish().total == 60


def test_a_process_that_has_ended_is_no_failure_while_another_has_not(helper):
    def ending(crew):
        while sum(process.has_run for process in crew._processes.values()) < 2:
            yield "sleep", 0.02

    with Crew(partial(helper, naps=True), 3) as crew:
        list(crew.map([("sleep", 0.02)] * 2))
        list(crew.map(ending(crew)))
        assert crew.finish().total > 2


def test_several_threads_have_crews(helper):
    def work():
        with Crew(helper, 2) as crew:
            totals.append((len(list(crew.map([("sleep", 0.01)] * 60))), crew.finish().total))

    totals: list[tuple[int, int]] = []
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == [(60, 60)] * 3


def test_one_task_or_one_worker_starts_no_process(helper):
    for num_workers, tasks in ((4, 1), (1, 5)):
        with Crew(partial(helper, 10), num_workers) as crew:
            assert len(list(crew.map([("sleep", 0)] * tasks))) == tasks
            assert crew.pids == []
            assert crew.finish().total == 10 + tasks
    with Crew(helper, 4) as crew:
        assert list(crew.map([])) == []
        assert crew.finish().total == 0


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("kill", RuntimeError, r"worker process \d+ was killed by SIGKILL"),
        ("exit", RuntimeError, r"worker process \d+ ended with exit status 3"),
        ("fail", OSError, r"cannot read chunk \d+"),
        ("secret", RuntimeError, r"Secret: cannot be pickled"),
        ("lambda", Exception, r"pickle"),
    ],
)
def test_a_process_that_fails_ends_the_whole(helper, kind, error, message):
    # This process sleeps a little at each task, so that the others come to theirs.
    tasks = [("sleep", 0.05), *[task for _ in range(100) for task in (("sleep", 0.05), (kind, os.getpid()))]]
    crew = Crew(helper, 2)
    with pytest.raises(error, match=message), crew:
        list(crew.map(tasks))
    pids = crew.pids
    assert len(pids) == 1
    assert not any(map(is_alive, pids))


def test_a_process_killed_from_outside(helper):
    def tasks():
        for i in range(400):
            if i == 100:
                os.kill(crew.pids[0], signal.SIGKILL)
            yield "sleep", 0.01

    crew = Crew(helper, 2)
    with pytest.raises(RuntimeError, match="was killed by SIGKILL"), crew:
        list(crew.map(tasks()))


def test_an_interrupt_ends_every_process(helper):
    def tasks():
        yield from [("sleep", 0.01)] * 50
        raise KeyboardInterrupt

    crew = Crew(helper, 3)
    with pytest.raises(KeyboardInterrupt), crew:
        list(crew.map(tasks()))
    pids = crew.pids
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_processes_end_when_their_parent_is_killed(helper, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from crew_helper import Helper; from rooflight.tokenizer.workers import Crew\n"
        "with Crew(Helper, 2) as crew:\n"
        "    for i, _ in enumerate(crew.map([('sleep', 0.05)] * 10_000)):\n"
        "        if i == 20: print(crew.pids[0], flush=True)\n"
    )
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_inside_a_daemonic_process(tmp_path, method):
    # As in a DataLoader's worker, which multiprocessing forbids to have children.
    path = tmp_path / "text"
    path.write_bytes(b"some words, and some more words\n" * 600_000)
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from rooflight.tokenizer import train_bpe\n"
        "def work(): assert len(train_bpe(sys.argv[1], 260, [], num_workers=2)[1]) == 4\n"
        "if __name__ == '__main__':\n"
        f"    process = multiprocessing.get_context({method!r}).Process(target=work, daemon=True)\n"
        "    process.start(); process.join(); sys.exit(process.exitcode)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", script, path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stopped_process_is_woken(helper):
    def tasks():
        for i in range(100):
            if i == 50:
                os.kill(crew.pids[0], signal.SIGSTOP)
            yield "sleep", 0.01

    with Crew(helper, 2) as crew:
        assert len(list(crew.map(tasks()))) == 100
        assert crew.finish().total == 100


def test_the_end_is_heard_while_another_process_has_a_copy_of_the_pipe(helper):
    """As one has that another thread forks meanwhile."""
    with Crew(helper, 2) as crew:
        results = crew.map([("sleep", 0.02)] * 60)
        next(results)
        copy = os.dup(crew._queue.fileno())
        assert len(list(results)) == 59
        total = []
        finish = threading.Thread(target=lambda: total.append(crew.finish().total))
        finish.start()
        finish.join(timeout=10)
        os.close(copy)
        finish_was_heard = not finish.is_alive()
        finish.join()
    assert finish_was_heard
    assert total == [60]


def test_many_processes_leave_file_descriptors(helper, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (11, 11))
    with Crew(helper, 40) as crew:
        assert len(list(crew.map([("none", 0)] * 4))) == 4
        assert len(crew.pids) == 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    with Crew(helper, 3) as crew:
        assert len(list(crew.map([("none", 0)] * 4))) == 4
        assert len(crew.pids) == 2


def test_standard_files_may_be_closed(helper, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from crew_helper import Helper; from rooflight.tokenizer.workers import Crew\n"
        "with Crew(Helper, 2) as crew:\n"
        "    pids = {pid for _, pid in crew.map([('sleep', 0.05)] * 60)}\n"
        "sys.exit(len(pids) - 2)\n"
    )
    closed = ["sh", "-c", 'exec "$0" "$@" <&- >&-', sys.executable, script, tmp_path]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_current_folder_and_prints_at_the_start_do_no_harm(helper, tmp_path):
    for name in ("code", "start", "current"):
        (tmp_path / name).mkdir()
    script = tmp_path / "code" / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from crew_helper import Helper; from rooflight.tokenizer.workers import Crew\n"
        "with Crew(Helper, 2) as crew:\n"
        "    print(len({pid for _, pid in crew.map([('sleep', 0.05)] * 60)}))\n"
    )
    (tmp_path / "start" / "sitecustomize.py").write_text("print('printed', flush=True)\n")
    (tmp_path / "current" / "pickle.py").write_text("raise SystemExit('the current folder comes first')\n")
    # no empty part, which would be the current folder
    path = os.pathsep.join(filter(None, [str(tmp_path / "start"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        cwd=tmp_path / "current",
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "printed\n2\n", done.stderr  # the worker's goes to standard error
    assert done.stderr == "printed\n"


def test_num_workers():
    assert check_num_workers(None) >= 1
    assert check_num_workers(3) == check_num_workers(np.int64(3)) == 3
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=r"num_workers: got .*, expected a positive integer or None"):
            check_num_workers(bad)
