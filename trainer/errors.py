"""What a user can put right."""


class ConfigError(Exception):
    """Bad configuration or input: one line naming the key or file, its value and what is allowed.

    The entry points print the line and exit with code 2.
    """
