import os
import signal
import time

import pytest

from fastseg.training.interrupt import GracefulInterrupt


def test_the_first_ctrl_c_asks_to_stop_and_a_second_one_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), GracefulInterrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and "Ctrl-C again stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_of_clusters_and_terminals_ask_to_stop(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with GracefulInterrupt() as stop:
        assert stop.exit_code == 130
        for _ in range(2):  # schedulers repeat themselves
            os.kill(os.getpid(), number)
        assert stop() and stop.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored():
    """As under nohup, where a run goes on after the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulInterrupt() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_does_not_hinder_the_stop(monkeypatch):
    def closed(*arguments):
        raise OSError("Input/output error")

    with GracefulInterrupt() as stop:
        monkeypatch.setattr(os, "write", closed)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop()
