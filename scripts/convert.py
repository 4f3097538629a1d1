"""Converts weights: python scripts/convert.py source=DIR target=DIR format=hf|native."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig

from trainer.checkpoint.convert import convert
from trainer.construct import call
from trainer.main import CONF, exit_codes, main, plain


@hydra.main(version_base=None, config_path=str(CONF), config_name="convert")
def run(config: DictConfig) -> None:
    with exit_codes("convert"):
        print(call(convert, plain(config), ""))


if __name__ == "__main__":
    main(run, config_name="convert")
