"""What was computed last, kept for the next time."""

from collections import OrderedDict


class Recent:
    """The last `size` results by key."""

    def __init__(self, size):
        self._size, self._items = size, OrderedDict()

    def get(self, key, make):
        """Return what `make` returned for the key, or returns now."""
        if key not in self._items:
            self._items[key] = make()
        self._items.move_to_end(key)
        while len(self._items) > self._size:
            self._items.popitem(last=False)
        return self._items[key]

    def clear(self):
        """Forget them all."""
        self._items.clear()
