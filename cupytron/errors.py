"""The error that a user can mend: its message names the value and the way out."""


class CupytronError(ValueError):
    """Base of every error that a user can mend; the command line prints it as one line."""


class ConfigError(CupytronError):
    """Settings that cannot be used; the message has a line for each of them."""


class CheckpointError(CupytronError):
    """A checkpoint that is missing, damaged or does not fit the model."""
