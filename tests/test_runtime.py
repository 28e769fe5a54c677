"""What a process knows about itself, and how it is stopped."""

import os
import signal

import pytest
from helpers import message_of

from core import runtime
from core.errors import UserError


@pytest.mark.parametrize("kind, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75),
                                        (signal.SIGUSR2, 75), (signal.SIGHUP, 75)])
def test_a_signal_is_noted_and_a_second_ctrl_c_obeyed(kind, code):
    before = signal.getsignal(kind)
    with runtime.Interruption() as interruption:
        assert interruption.asked is None
        os.kill(os.getpid(), kind)
        assert interruption.asked == kind and interruption.exit_code == code
        if kind == signal.SIGINT:
            assert signal.getsignal(kind) == before  # a second one
        else:
            os.kill(os.getpid(), kind)  # Slurm and each launcher say it again
    assert signal.getsignal(kind) == before


@pytest.mark.parametrize("name, value", [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8"),
                                         ("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "1")])
def test_what_accelerate_would_do_on_its_own_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert message_of(runtime.check_environment).startswith(name)


@pytest.mark.parametrize("steps", ["1", ""])
def test_no_accumulation_is_nothing_to_refuse(monkeypatch, steps):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    runtime.check_environment()


def test_the_error_of_the_first_process_is_said_by_it():
    def fails():
        raise UserError("a mistake")

    process = runtime.start()
    assert runtime.by_first(process, lambda: (1, "two")) == (1, "two")
    assert message_of(lambda: runtime.by_first(process, fails)) == "a mistake"
