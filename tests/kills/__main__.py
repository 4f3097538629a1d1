"""See the package: prints the report as one JSON object, its last line of standard output."""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from tests.kills.harness import Harness


def main(arguments: list[str]) -> None:
    options = {"ranks": "2", "trials": "20", "seed": "0"}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(argument)
    logging.getLogger("trainer").setLevel(logging.ERROR)  # drafts left behind are the point here
    folder = Path(tempfile.mkdtemp(prefix="kills-"))  # stays where a restart went wrong
    ranks, seed = int(options["ranks"]), int(options["seed"])
    harness = Harness(folder, ranks, seed=seed, overrides=overrides)
    report = harness.run(int(options["trials"]))
    shutil.rmtree(folder)
    print(json.dumps({"ranks": ranks, "overrides": overrides} | report.summary()))


if __name__ == "__main__":
    main(sys.argv[1:])
