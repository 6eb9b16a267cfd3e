"""Being asked to stop while something long is at work: Ctrl-C, kill, a closed terminal, a notebook's stop button."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import os
import signal
import stat
import time
from contextlib import contextmanager
from threading import current_thread, main_thread

from tqdm import tqdm

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequests:
    """False until somebody asks to stop after the present step.

    A second request, more than a second later, stops at once, but never in the middle of `saving`. A notebook's stop
    button sends several signals within half a second. Where there is `nothing_to_save`, the first one stops at once.
    """

    def __init__(self):
        self.first, self.busy, self.idle = None, False, False

    def __bool__(self) -> bool:
        return self.first is not None

    def ask(self, number, frame):
        if number == getattr(signal, "SIGHUP", None):
            let_go_of_terminal()
        if self.idle:
            self.idle, self.first = False, time.monotonic()
            raise KeyboardInterrupt
        if self.first is None:
            self.first = time.monotonic()
            tqdm.write("\nTermino este paso, guardo y lo dejo; otra vez Ctrl-C para salir ya.")
        elif not self.busy and time.monotonic() - self.first > 1:
            raise KeyboardInterrupt

    @contextmanager
    def saving(self):
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @contextmanager
    def nothing_to_save(self, really=True):
        self.idle = really
        try:
            if really and self:  # asked for just before
                raise KeyboardInterrupt
            yield
        finally:
            self.idle = False


def let_go_of_terminal():
    """Writing to a terminal or a pipe that was closed is an error; a file that the output goes to is not touched."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        except OSError:
            continue  # closed already
    os.close(nowhere)


@contextmanager
def stop_requests():
    """Yield `StopRequests`; whoever is to ignore a closed terminal (nohup) goes on ignoring it."""
    requests, old = StopRequests(), {}
    for number in SIGNALS if current_thread() is main_thread() else ():
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:
            old[number] = signal.signal(number, requests.ask)
    try:
        yield requests
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
