from __future__ import annotations

import os
import signal
import threading

import pytest

from autorank.interruption import Interruption


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_waits_for_the_end_of_the_block() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        assert interruption.noted is None
        send(signal.SIGINT)
        assert interruption.noted == signal.SIGINT
        done = True
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_is_delivered_where_the_program_stands() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), Interruption():
        send(signal.SIGINT)
        send(signal.SIGINT)
        done = True
    assert not done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_each_signal_does_what_it_did_before() -> None:
    class Ended(BaseException):
        pass

    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended), Interruption():
            send(signal.SIGTERM)
        with pytest.raises(Ended), Interruption():
            send(signal.SIGINT)
            send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGINT)
            assert interruption.noted is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ZeroDivisionError), Interruption():
        send(signal.SIGINT)
        raise ZeroDivisionError


def test_without_a_signal_nothing_happens() -> None:
    with Interruption() as interruption:
        pass
    assert interruption.noted is None


def test_another_thread_has_no_signals() -> None:
    noted: list[object] = []

    def work() -> None:
        with Interruption() as interruption:
            noted.append(interruption.noted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [None]
