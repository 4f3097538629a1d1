"""Kept memory is written without new page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from trainer.heap import keep_heap
assert sys.argv[1] == "default" or keep_heap()
size, libc = 2**26, ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
    block = libc.malloc(ctypes.c_size_t(size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(3)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back")
def test_a_block_is_reused():
    default, kept = (
        int(subprocess.check_output([sys.executable, "-c", SCRIPT, mode]))
        for mode in ("default", "keep")
    )
    assert default > 20 and kept < default / 10  # of 2 MiB or 4 KiB a page
