"""The errors a user can cause, each with the exit code that the command line gives it."""


class SsahError(ValueError):
    """A mistake in what the user passed: the message is one line that names the argument, the value and the remedy."""

    exit_code = 2


class RunError(SsahError):
    """Something outside the arguments failed during a run (a full disk, a file that vanished)."""

    exit_code = 1


class NonFiniteError(SsahError):
    """A NaN or Inf in weights or activations; the message names the module and the channel."""


class OutOfMemoryError(SsahError):
    """The device ran out of memory; the message says which flag makes the run smaller."""

    exit_code = 5
