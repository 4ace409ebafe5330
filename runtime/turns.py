"""One use of a pipeline at a time: its engines have one set of memory for their tensors."""

import functools
import threading

from .errors import require


class Turn(threading.local):
    """What a thread does with a pipeline. drawing: whether it is at a picture."""

    drawing = False

    def __init__(self, lock):
        self.lock = lock


def new_turn():
    """Return the Turn of a new pipeline."""
    return Turn(threading.RLock())


def in_turn(method):
    """Make other threads wait until a method of a pipeline is done; a method may call others."""
    @functools.wraps(method)
    def alone(pipeline, *args, **kwargs):
        with pipeline._turn.lock:
            return method(pipeline, *args, **kwargs)

    return alone


def draws(method):
    """As `in_turn`, for what draws a picture: its callback, which has the turn, must not begin another."""
    @functools.wraps(method)
    def alone(pipeline, *args, **kwargs):
        turn = pipeline._turn
        require(not turn.drawing, "callback", "not draw with the pipeline that calls it", "a call of generate")
        with turn.lock:
            turn.drawing = True
            try:
                return method(pipeline, *args, **kwargs)
            finally:
                turn.drawing = False

    return alone
