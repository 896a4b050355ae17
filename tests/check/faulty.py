"""Sections that go wrong, as the runner must see them."""

import os
import signal
import sys
import time


def sleeps(rows, place):
    rows.add("first", "ok")
    place.run(rank_sleeps, 1, rows.path, timeout_s=600)


def looks_at_the_clock(rows, place):
    rows.add("first", "ok", left=place.left_s)


def rank_sleeps(path):
    print("what the rank printed", flush=True)
    with open(f"{path}.pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def dies(rows, place):
    rows.add("first", "ok")
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(rows, place):
    rows.add("first", "ok")
    sys.exit(3)


def raises(rows, place):
    rows.add("first", "ok")
    print("what it printed before")
    raise KeyError("what went wrong")


def finds_a_fault(rows, place):
    rows.add("first", "ok")
    rows.add("second", "failed", "3e-1 off")


def skips(rows, place):
    rows.add("all", "skipped", "there is no such thing here")


def says_nothing(rows, place):
    pass


def works(rows, place):
    rows.add("first", "ok", "as it should", core="a core")
    rows.add("second", "warning", "attention ran unfused " * 12)
