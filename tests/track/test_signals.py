"""R-13: the first signal sets a flag, a second Ctrl-C leaves at once, handlers come back."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from burnish.track.signals import SignalFlag

LOOP = """
import sys, time
from burnish.track.signals import SignalFlag
with SignalFlag() as stop:
    print("ready", flush=True)
    while not stop or "--deaf" in sys.argv:
        time.sleep(0.01)
    print("saved", stop.signum, flush=True)
sys.exit(128 + stop.signum)
"""


def start(*args: str) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_r13_one_signal_saves_and_ends(signum, status):
    child = start()
    child.send_signal(signum)
    out, err = child.communicate(timeout=10)
    assert child.returncode == status and out == f"saved {int(signum)}\n"
    assert ("Ctrl-C again" in err) == (signum == signal.SIGINT)


def test_r13_a_second_ctrl_c_leaves_at_once():
    child = start("--deaf")
    child.send_signal(signal.SIGINT)
    time.sleep(0.4)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = child.communicate(timeout=10)
    assert child.returncode == 130 and time.monotonic() - began < 2 and out == ""
    assert "left at once" in err


def test_r13_one_key_press_that_arrives_twice_is_one():
    """The terminal signals the whole process group, and a launcher passes its copy on."""
    child = start()
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=10)
    assert child.returncode == 130 and out == "saved 2\n"


def test_r13_sigterm_twice_still_saves():
    child = start("--deaf")
    for _ in range(3):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.25)
    assert child.poll() is None
    child.kill()
    child.communicate()


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
