"""The error that a user can mend: its message names the value and the way out."""


class CupytronError(ValueError):
    """Base of every error that a user can mend; the command line prints it as one line."""


class ConfigError(CupytronError):
    """Settings that cannot be used; the message has a line for each of them."""


class CheckpointError(CupytronError):
    """A checkpoint that is missing, damaged or does not fit the model."""


class DamagedCheckpoint(CheckpointError):
    """Its own files prove that it is damaged or incomplete: an older one may take its place."""


class UnreadableCheckpoint(CheckpointError):
    """It cannot be read here and now, which proves no damage: an I/O error, or a newer format."""


class GoneCheckpoint(CheckpointError):
    """It was removed or replaced while it was read: the reader chooses again."""


class WrongLauncher(CupytronError):
    """MPI cannot be loaded, or does not know of the processes that the launcher started."""
