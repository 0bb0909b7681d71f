"""R-13: the first signal sets a flag, a second Ctrl-C leaves at once, handlers come back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from burnish.track.signals import SignalFlag
from tests.waiting import BOUND

# Each line of its input is the time; it answers whether it has been told to stop, and "end" makes it save and leave.
LOOP = """
import sys
from burnish.track import signals
now = 0.0
signals.mono = lambda: now
with signals.SignalFlag() as stop:
    print("ready", flush=True)
    while (line := sys.stdin.readline().strip()) != "end":
        now = float(line)
        print("stopping" if stop else "going", flush=True)
    print("saved", stop.signum, flush=True)
sys.exit(128 + stop.signum)
"""


def start() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", LOOP], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def look(child: subprocess.Popen[str], now: float) -> str:
    """Set the child's clock; what it says it is doing, after every signal sent before."""
    assert child.stdin and child.stdout
    child.stdin.write(f"{now}\n")
    child.stdin.flush()
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> tuple[str, str]:
    return child.communicate("end\n", timeout=BOUND)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_r13_one_signal_saves_and_ends(signum, status):
    child = start()
    assert look(child, 1.0) == "going"
    child.send_signal(signum)
    assert look(child, 2.0) == "stopping"
    out, err = end(child)
    assert child.returncode == status and out == f"saved {int(signum)}\n"
    assert ("Ctrl-C again" in err) == (signum == signal.SIGINT)


def test_r13_a_second_ctrl_c_leaves_at_once():
    child = start()
    child.send_signal(signal.SIGINT)
    assert look(child, 0.4) == "stopping"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=BOUND)
    assert child.returncode == 130 and out == ""
    assert "left at once" in err


def test_r13_one_key_press_that_arrives_twice_is_one():
    """The terminal signals the whole process group, and a launcher passes its copy on."""
    child = start()
    child.send_signal(signal.SIGINT)
    assert look(child, 0.1) == "stopping"
    child.send_signal(signal.SIGINT)
    assert look(child, 0.1) == "stopping"
    out, _ = end(child)
    assert child.returncode == 130 and out == "saved 2\n"


def test_r13_sigterm_twice_still_saves():
    child = start()
    for now in (1.0, 2.0, 3.0):
        child.send_signal(signal.SIGTERM)
        assert look(child, now) == "stopping"
    assert end(child)[0] == "saved 15\n" and child.returncode == 143


def test_r13_handlers_come_back_and_the_first_signal_counts():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with SignalFlag() as stop:
        assert not stop and stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop and stop.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_r13_nested_flags_restore_each_other():
    with SignalFlag() as outer:
        with SignalFlag() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner and not outer
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer


def test_outside_the_main_thread_nothing_happens():
    seen = []

    def work() -> None:
        with SignalFlag() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
