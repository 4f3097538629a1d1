"""Run on ranks: one of the commands, as its script runs it."""

import sys

from trainer import main as commands


def main(name: str, *arguments: str) -> None:
    sys.argv = [f"{name}.py", *arguments]
    commands.command(name, getattr(commands, name))
