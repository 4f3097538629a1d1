"""What a user can put right, and what ends a run."""


class ConfigError(Exception):
    """Bad configuration or input: one line naming the key or file, its value and what is allowed.

    The entry points print the line and exit with code 2.
    """


class TrainingError(Exception):
    """The run cannot go on, e.g. a loss that is not finite: one line naming step and batch.

    The entry point prints the line and exits with code 1.
    """
