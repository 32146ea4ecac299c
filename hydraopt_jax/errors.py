"""The one exception a caller needs to catch for bad input."""


class HydraOptError(ValueError):
    """Bad input or bad use: one line that names the file, tensor or option and the way out."""
