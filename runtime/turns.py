"""One use of a pipeline at a time: its engines have one set of memory for their tensors."""

import functools

from .errors import require


def in_turn(method):
    """Make other threads wait until a method of a pipeline is done; a method may call others."""
    @functools.wraps(method)
    def alone(pipeline, *args, **kwargs):
        with pipeline._lock:
            return method(pipeline, *args, **kwargs)

    return alone


def draws(method):
    """As `in_turn`, for what draws a picture: its callback, which has the turn, must not begin another."""
    @functools.wraps(method)
    def alone(pipeline, *args, **kwargs):
        with pipeline._lock:
            require(not pipeline._drawing, "callback", "not draw with the pipeline that calls it", "a call of generate")
            pipeline._drawing = True
            try:
                return method(pipeline, *args, **kwargs)
            finally:
                pipeline._drawing = False

    return alone
