"""The exporter's error; its module imports nothing, so that engine builds need no torch to report one."""


class ExportError(ValueError):
    """An export that cannot be done; the message is one sentence."""
