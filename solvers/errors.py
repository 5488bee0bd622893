"""The one error a user's input can cause."""


class GliodeError(ValueError):
    """Bad input: the message names the file or key at fault and the way out."""
