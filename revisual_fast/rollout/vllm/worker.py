"""The engine process: ``python -m revisual_fast.rollout.vllm.worker FD`` runs vLLM and obeys the trainer.

FD is a socket on which :mod:`~revisual_fast.rollout.messages` come and go. The process, with all that vLLM has started,
ends when the other end is closed: an engine does not outlive its trainer.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from revisual_fast.rollout.messages import Problem, Reply
from revisual_fast.rollout.vllm.commands import Commands, problem_of

__all__ = ["main", "serve"]


def serve(pipe: Connection, commands: Commands) -> None:
    """Obey the commands that come, until ``close`` or the end of the other side."""
    while True:
        try:
            command = pipe.recv()
            given = {"emit": pipe.send} if command.name == "generate" else {}
            try:
                answer: Reply | Problem = Reply(getattr(commands, command.name)(**command.kwargs, **given))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                traceback.print_exc()  # all of it into the log
                answer = problem_of(error)
            pipe.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        if command.name == "close":
            return


def _watch(fd: int) -> None:
    """End the whole process group when the other end of ``fd`` closes, whatever the engine is busy with."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main(commands: Commands | None = None) -> None:
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)  # else vLLM's own processes would hold it open
    threading.Thread(target=_watch, args=(fd,), daemon=True).start()
    serve(Connection(fd), commands or Commands())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Python would take seconds to tear vLLM's modules down


if __name__ == "__main__":
    main()
