"""Errors a user can act on. Each carries the process exit code of DESIGN.md; anything else is a bug (exit 1)."""


class PacelineError(ValueError):
    """Something the user can put right. The message is one line: what, the value, the remedy."""

    exit_code = 1


class ConfigError(PacelineError):
    """Wrong usage or configuration, found before anything starts."""

    exit_code = 2


class PreflightError(PacelineError):
    """Something the run needs is missing or unusable: a model, its weights, a free run directory."""

    exit_code = 3


class ResourceError(PacelineError):
    """Memory or devices do not suffice."""

    exit_code = 4


class DivergedError(PacelineError):
    """Training produced a non-finite loss or gradient."""

    exit_code = 5


class StorageError(PacelineError):
    """A checkpoint or another file of the run could not be written or read."""

    exit_code = 6


class RecoveryError(PacelineError):
    """Workers were lost more often than the run may start them again."""

    exit_code = 7


class DataError(PacelineError):
    """The reward or data policy was broken: bad rows, an empty data set, a reward that fails."""

    exit_code = 8


class PreemptedError(PacelineError):
    """The run was asked to stop; its state is saved and it can be resumed."""

    exit_code = 75
