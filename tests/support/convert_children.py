"""Conversions in processes that can be killed, forked from one that has everything imported: each costs little."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


SERVER = """
import json, os, signal, sys
from grok1.conversion import convert, journal

def die_at(count):
    # Counts the calls that change the disk, and dies before the one with this number.
    calls = 0
    def counted(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    for name in ("open", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    return lambda: calls

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        calls = die_at(order["die_at"])
        try:
            if order["file_limit"]:
                import resource
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
            convert.convert(**order["arguments"])
            result, code = {"calls": calls()}, 0
        except BaseException as error:
            result, code = {"error": f"{type(error).__name__}: {error}"}, 1
        with open(order["report"], "w") as report:
            json.dump(result, report)
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Child:
    """One running conversion."""

    def __init__(self, server: subprocess.Popen, report: Path):
        self.server, self.report = server, report
        self.pid = int(server.stdout.readline())

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return int(self.server.stdout.readline())

    def result(self) -> dict[str, Any]:
        return json.loads(self.report.read_text())


class Children:
    def __init__(self, folder: Path):
        self.report = folder / "report.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, die_at: int = 0, file_limit: int = 0, **arguments: Any) -> Child:
        """Begins `convert(**arguments)`: killed before its n-th change of the disk, with a limit on a file's size."""
        self.report.unlink(missing_ok=True)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        order = {"arguments": arguments, "die_at": die_at, "file_limit": file_limit, "report": str(self.report)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return Child(self.server, self.report)

    def run(self, **arguments: Any) -> Child:
        """The same, waited for; it must end well."""
        child = self.start(**arguments)
        assert child.wait() == 0, child.result()
        return child

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
