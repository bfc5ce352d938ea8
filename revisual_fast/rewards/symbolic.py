"""Equality of mathematical expressions by math-verify, in a process of its own.

An answer may be anything, and some expressions (``9^{9^{9^9}}``, ``99999999!``) keep sympy busy for ever inside one
C call that no signal handler interrupts. So this file is also a program: it reads ``[gold, answer]`` as JSON, a line
each, and writes ``true`` or ``false``. The operating system ends it when one comparison has used ``CPU_SECONDS`` of
processor time (not wall time: the verdict must not depend on how busy the machine is); the next call starts another.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from functools import lru_cache

__all__ = ["CPU_SECONDS", "symbolically_equal"]

CPU_SECONDS = 3.0
MEMORY_BYTES = 4 * 2**30
_log = logging.getLogger(__name__)


class _Worker:
    """The process, started when it is first needed."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self.cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[str] | None = None
        self.forget()

    def ask(self, gold: str, answer: str) -> bool | None:
        """The verdict; None if the process did not survive the question. RuntimeError if it cannot be started."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.close()  # it died since the last question
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            except BaseException:  # Ctrl-C: the reply is still to come and must not be taken for the next one's
                self.close()
                raise
            if reply:
                return json.loads(reply)
            self.close()
            return None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def forget(self) -> None:
        """Leave the process, if there is one, to whoever else has it."""
        self._process = None
        self._lock = threading.Lock()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", __file__, str(self.cpu_seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)} did not start; is math-verify installed? pip install math-verify")
        self._process = process
        return process


_worker = _Worker()
os.register_at_fork(after_in_child=_worker.forget)  # a forked child must not talk through its parent's pipes


@lru_cache(maxsize=16384)
def symbolically_equal(gold: str, answer: str) -> bool:
    """Whether the LaTeX or plain ``answer`` equals ``gold``.

    An answer on which the comparison gives up (see above) is not equal; a warning says so.
    """
    verdict = _worker.ask(gold, answer)
    if verdict is None:
        _log.warning("could not compare %r with %r within %g s; counted as wrong", answer, gold, _worker.cpu_seconds)
    return bool(verdict)


def _main(cpu_seconds: float) -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; this process ends when its input does
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which is to end the process
    logging.disable(logging.WARNING)
    out = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # nothing else may write where the verdicts go
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    @lru_cache(maxsize=1024)
    def parsed(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        gold, answer = json.loads(line)
        verdict = verify(parsed(gold), parsed(answer), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(verdict)), file=out, flush=True)


if __name__ == "__main__":
    _main(float(sys.argv[1]))
