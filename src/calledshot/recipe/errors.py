"""What the user is told when something cannot go on: one line, with the way out, and an exit code."""


class ShotError(Exception):
    """An error for the person at the keyboard: its text is one line that names the file, the key and the way out."""

    exit_code = 1


class RunError(ShotError):
    """Something failed while running: a corrupt shard, a full disk, a run that diverged. Exit code 1."""


class UsageError(ShotError):
    """What was asked for cannot be done as asked: an unknown key, a missing file, a context too long. Exit code 2."""

    exit_code = 2


class Requeue(ShotError):
    """Nothing is wrong, but this attempt must be started again. Exit code 75."""

    exit_code = 75
