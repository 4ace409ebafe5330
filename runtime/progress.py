"""What the caller of `Pipeline.generate` sees of its steps: a callback, a bar."""

from .errors import PidiffError


class Progress:
    """Counts steps over all batches, for the caller's callback and the bar."""

    def __init__(self, callback, bar, total, decode):
        if callback is not None and not callable(callback):
            raise PidiffError(f"callback must be callable or None, got {type(callback).__name__}")
        self._callback, self._total, self._done, self._decode, self._bar = callback, total, 0, decode, None
        if bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="step", leave=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    @property
    def on_step(self):
        """What the loop calls after every step; None where nobody watches, for it may have to wait and copy for it."""
        return self._step if self._callback or self._bar is not None else None

    def _step(self, step, latents, denoised):
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        return bool(self._callback(self._done, self._total, lambda: self._decode(denoised))) if self._callback else False
