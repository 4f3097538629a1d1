"""Checks of what a constructor is given."""


def positive(**sizes: int | None) -> None:
    """Raises ValueError naming the first size below 1; None stands for absent and passes."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
