"""Ctrl-C is kept until a block ends, and children do not see it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from unsloth_factory.inference.generate import Generation
from unsloth_factory.inference.interrupts import children_ignore_interrupts, deferred_interrupt
from unsloth_factory.inference.stream import gguf_tokens


def test_the_interrupt_comes_at_the_end_of_the_block():
    done = []

    def block():
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == [True]
    with deferred_interrupt():
        pass


def test_children_ignore_it():
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    before = signal.getsignal(signal.SIGINT)  # a job that a shell starts in the background inherits SIG_IGN
    with children_ignore_interrupts():
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "True"
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone():
    ran = []

    def work():
        with deferred_interrupt(), children_ignore_interrupts():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


class FakeGguf:
    """Says 5, 6, 7 and then stops; counts its calls."""

    max_positions = 100

    def __init__(self):
        self.calls = []

    def generate(self, ids, max_new_tokens, stop_ids, **sampling):
        self.calls.append((list(ids), max_new_tokens, sampling["seed"]))
        made = len(ids) - 2
        return Generation([], True) if made == 3 else Generation([5 + made], False)


def test_a_gguf_answers_token_by_token_until_it_stops():
    model = FakeGguf()
    assert list(gguf_tokens(model, [1, 2], stop_ids=[9], max_new_tokens=10)) == [5, 6, 7]
    assert model.calls[2] == ([1, 2, 5, 6], 1, 2)
    model = FakeGguf()
    assert list(gguf_tokens(model, [1, 2], stop_ids=[9], max_new_tokens=2)) == [5, 6]
    assert len(model.calls) == 2
