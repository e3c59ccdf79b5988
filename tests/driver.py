"""Run the scripts for the tests, each in a new process, without the time of the imports.

Each line of standard input is a case, and the answer is the number of its process. Sent
that number, the driver waits for its end and answers with its exit code, and the CPU
seconds and bytes read by it and its workers.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import rasterio  # noqa: F401
import scipy.ndimage  # noqa: F401


def count_bytes():
    """Return how many bytes this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])


for line in sys.stdin:
    case = json.loads(line)
    if isinstance(case, int):
        before = count_bytes()  # those of processes that were waited for, too
        _, status, taken = os.wait4(case, 0)
        costs = taken.ru_utime + taken.ru_stime, count_bytes() - before
        print(json.dumps([os.waitstatus_to_exitcode(status), *costs]), flush=True)
        continue
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        for number in (1, 2):
            output = os.open(f"{case['output']}.{number}", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, number)
        folder = case["folder"]
        if folder.startswith("/proc/"):  # on a disk that only another process sees
            process, folder = folder.split("/root", 1)
            for kind in ("user", "mnt"):
                namespace = os.open(f"{process}/ns/{kind}", os.O_RDONLY)
                assert ctypes.CDLL(None).setns(namespace, 0) == 0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not so behind "&"
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nor behind nohup
        os.chdir(folder)
        os.environ |= case["environment"]
        code = Path(case["arguments"][0]).read_text()
        for old, new in case["changes"].items():
            code = code.replace(old, new)
        signal.alarm(int(sys.argv[1]))
        sys.argv = case["arguments"]
        exec(case["hook"], {})  # noqa: S102
        exec(code)  # noqa: S102
        break
