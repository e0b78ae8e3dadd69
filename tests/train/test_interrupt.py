"""The first signal may wait for the state to be saved; the second one ends the process at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from train.interrupt import Interrupt

NUMBERS = [signal.SIGINT, signal.SIGTERM]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_first_signal_in_deferred_sets_the_number_and_says_so(number, capfd):
    with Interrupt() as interrupt:
        with interrupt.deferred():
            assert interrupt.number == 0
            os.kill(os.getpid(), number)
            wait_until(lambda: interrupt.number)
            wait_until(lambda: "saving" in capfd.readouterr().out)
        assert interrupt.number == number


def test_silent_process_still_stops(capfd):
    with Interrupt() as interrupt, interrupt.deferred():
        interrupt.is_silent = True
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: interrupt.number)
    assert interrupt.number == signal.SIGTERM
    assert capfd.readouterr().out == ""


def test_other_signals_keep_their_handlers():
    seen = []
    earlier = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        with Interrupt() as interrupt, interrupt.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: seen)
            assert interrupt.number == 0
    finally:
        signal.signal(signal.SIGUSR1, earlier)


def test_handlers_are_put_back():
    earlier = [signal.getsignal(number) for number in NUMBERS]
    with Interrupt():
        assert [signal.getsignal(number) for number in NUMBERS] != earlier
    assert [signal.getsignal(number) for number in NUMBERS] == earlier
    assert signal.set_wakeup_fd(-1) == -1


# The main thread is in C for good, as in a long compilation: no Python handler would run. A lock
# that libc waits for is not given up for a signal.
BLOCKED = """
import ctypes, sys
from train.interrupt import Interrupt
libc = ctypes.CDLL(None)
libc.pthread_mutex_init(mutex := ctypes.create_string_buffer(64), None)
libc.pthread_mutex_lock(mutex)
with Interrupt() as interrupt:
    if sys.argv[1] == "deferred":
        with interrupt.deferred():
            print("ready", flush=True)
            libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("place", ["outside", "deferred"])
def test_ends_while_the_main_thread_is_blocked(number, place):
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if place == "deferred":
        assert process.stdout.readline() == "\n"
        assert "once more to stop at once" in process.stdout.readline()
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out == f"\n{number.name}: stopped; run the same command to go on\n"
    assert err == ""
