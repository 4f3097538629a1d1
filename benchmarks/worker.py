"""The process of one measurement: reads a job from a file, prints its result, in JSON.

The ranks of a measurement on several are such processes under torchrun; the first one prints.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.context import measure_case
from benchmarks.job import Job, Result
from benchmarks.measure import matmul_flops, measure
from benchmarks.profile import profile
from benchmarks.saved import measure_saved
from benchmarks.saves import measure_saves
from benchmarks.subjects import mixer_pass, train_step, transformers_step
from trainer.heap import keep_heap

SUBJECTS = {"train": train_step, "transformers": transformers_step, "mixer": mixer_pass}


def run(job: Job) -> Result:
    torch.set_num_threads(job.threads)
    if job.malloc == "keep":
        keep_heap()
    if job.kind == "matmul":
        return {"flops": matmul_flops(job.dtype, job.device)}
    if job.kind == "attention":
        return measure_case(job)
    if job.kind == "checkpoint":
        return measure_saves(job)
    if job.kind == "saved":
        return measure_saved(job)
    subject = SUBJECTS[job.kind](job)
    result = measure(subject.step, repeats=job.repeats, device=torch.device(job.device))
    if job.profile:
        result["parts"] = profile(subject.step, subject.module, device=torch.device(job.device))
    return result


def main() -> None:
    # Where memory runs out, this process is to be killed and no other one on the machine.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    result = run(job)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))


if __name__ == "__main__":
    main()
