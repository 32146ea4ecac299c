"""The exception that a caller needs to catch for bad input, and its kinds."""


class HydraOptError(ValueError):
    """Bad input or bad use: one line that names the file, tensor or option and the way out."""


class TooLarge(HydraOptError):
    """A store that would exceed the bytes it may take."""
