"""Measures: python scripts/benchmark.py suite=NAME key=value ...; see conf/benchmark.yaml."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import benchmark
from trainer.main import command

if __name__ == "__main__":
    command("benchmark", benchmark)
