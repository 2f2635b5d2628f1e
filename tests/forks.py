"""Python code in processes that have imported torch and nothing of ours: forks of one, as the import takes seconds."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


class Server:
    """The process that is forked; it starts with the first call and ends with this one."""

    process: subprocess.Popen[str] | None = None

    def run(
        self, code: str, env: Mapping[str, str] | None = None, timeout: int = 120
    ) -> subprocess.CompletedProcess[str]:
        """As `python -c code` with captured text; after `timeout` seconds it is killed.

        What torch reads from the environment while it is imported stays as it is here.
        """
        if self.process is None:
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen([sys.executable, __file__], text=True, **streams)
            atexit.register(self.process.stdin.close)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            environment = dict(os.environ if env is None else env)
            request = [code, environment, os.getcwd(), [str(file) for file in files], timeout]
            print(json.dumps(request), file=self.process.stdin, flush=True)
            status = os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
            return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files))


run = Server().run


def serve() -> None:
    """Fork for each line of the standard input; a fork returns from here to end as any process does."""
    import torch.fx.experimental.symbolic_shapes  # sympy with it, but not yet triton  # noqa: F401

    for line in sys.stdin:
        if child := os.fork():
            sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
            sys.stdout.flush()
            continue
        code, environment, folder, files, timeout = json.loads(line)
        signal.alarm(timeout)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.argv, sys.path[0] = ["-c"], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        return


if __name__ == "__main__":
    serve()
