"""Run on ranks, or alone: a script of the repository, as from the command line."""

import runpy
import sys

from tests import quick_hydra
from tests.launch import ROOT


def main(script: str, *arguments: str) -> None:
    quick_hydra.install()
    sys.argv = [str(ROOT / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
