"""The errors a user's input can cause."""


class GliodeError(ValueError):
    """Bad input: the message names the file or key at fault and the way out."""


class Diverged(GliodeError):
    """A solver has no finite answer at these values: a step too long, Newton that fails, an explosion.

    At a trial point of an optimizer this counts as J = infinity, at its start it is raised.
    """
