"""The trainer's side of an engine process: started, talked to, watched and ended.

The child is ``python -m MODULE FD``, in a session of its own, so that Ctrl-C in the terminal does not reach it and the
trainer can finish its step. FD is one end of a socket pair that carries pickled :mod:`~revisual_fast.rollout.messages`;
the child ends when it finds the other end closed.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from revisual_fast.rollout.engine import EngineError, Sampling
from revisual_fast.rollout.messages import (
    Alive,
    Command,
    EngineSettings,
    Event,
    Failed,
    Finished,
    Problem,
    Reply,
    Request,
)
from revisual_fast.rollout.remote import EngineLost

__all__ = ["ProcessConnection", "without_torchrun"]

WORKER = "revisual_fast.rollout.vllm.worker"
CLOSE_SECONDS = 10.0
"""How long an engine may take to end when asked to."""
TAIL = 4096
"""Bytes of the log that an error message shows at most."""


class ProcessConnection:
    """The :class:`~revisual_fast.rollout.remote.Connection` to a child process.

    What the child prints goes to ``log``, after what is there already. The child may take ``start_seconds`` to be
    ready and is taken for hung when it is silent for ``stall_seconds``. ``env`` is added to its environment; ``module``
    is what it runs. It ends with this object, and with the trainer.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        start_seconds: float,
        stall_seconds: float,
        log: Path,
        env: Mapping[str, str] | None = None,
        module: str = WORKER,
    ):
        self.settings = settings
        self.start_seconds, self.stall_seconds = start_seconds, stall_seconds
        self.log, self.env, self.module = Path(log), dict(env or {}), module
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, which leads its process group; None while there is none."""
        return self._child.process.pid if self._child else None

    def start(self) -> int:
        """Start the child and wait until it can be used; rows of its model's head."""
        self.kill()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._child = _Child(self)
        with self._unbroken():
            self._send(Command("start", {"settings": self.settings}))
            return self._answer(self.start_seconds)

    def call(self, name: str, *, timeout: float | None = None, **kwargs: Any) -> Any:
        with self._unbroken():
            self._send(Command(name, kwargs))
            return self._answer(timeout or self.stall_seconds)

    def generate(self, requests: Sequence[Request], n: int, sampling: Sampling) -> Generator[Event]:
        with self._unbroken():
            self._send(Command("generate", {"requests": list(requests), "n": n, "sampling": sampling}))
            while isinstance(message := self._receive(self.stall_seconds), Finished | Failed | Alive):
                yield message
            _value(message)

    def kill(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def close(self) -> None:
        if self._child is not None:
            try:
                self._send(Command("close"))
                wait([self._child.ended], CLOSE_SECONDS)
            except EngineLost:
                pass  # it cannot be asked any more
        self.kill()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """A conversation that is left in the middle cannot be taken up again: it ends the child."""
        try:
            yield
        except EngineError:  # the child is well
            raise
        except BaseException:
            self.kill()
            raise

    def _send(self, command: Command) -> None:
        assert self._child is not None, "start first"
        try:
            self._child.pipe.send_bytes(pickle.dumps(command))  # send() would pass tensors on as shared memory
        except BlockingIOError:
            raise self._hung(self.stall_seconds) from None
        except OSError:
            raise self._died() from None

    def _answer(self, seconds: float) -> Any:
        """The value of the reply; signs of life before it are passed over."""
        while isinstance(message := self._receive(seconds), Alive):
            pass
        return _value(message)

    def _receive(self, seconds: float) -> Any:
        """The child's next message, which may take ``seconds``."""
        child = self._child
        assert child is not None, "start first"
        try:
            if not child.pipe.poll() and not wait([child.pipe, child.ended], seconds):
                raise self._hung(seconds)
            if not child.pipe.poll():
                raise self._died()
            return child.pipe.recv()
        except BlockingIOError:
            raise self._hung(self.stall_seconds) from None
        except (EOFError, OSError):
            raise self._died() from None

    def _hung(self, seconds: float) -> EngineLost:
        return EngineLost("hung", f"the engine process has been silent for {seconds:g} seconds{self._tail()}")

    def _died(self) -> EngineLost:
        assert self._child is not None
        wait([self._child.ended], CLOSE_SECONDS)  # the pipe closes a little before the process has ended
        status = self._child.end()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return EngineLost("died", f"the engine process {how}{self._tail()}")

    def _tail(self) -> str:
        """The last lines that this child has printed."""
        assert self._child is not None
        with self.log.open("rb") as log:
            log.seek(max(self._child.log_start, log.seek(0, os.SEEK_END) - TAIL))
            text = log.read().decode(errors="replace").strip()
        return f"; the end of {self.log}:\n{text}" if text else f"; it has printed nothing to {self.log}"


class _Child:
    """A started process with its pipe. Both block at most ``stall_seconds`` in the middle of a message."""

    def __init__(self, connection: ProcessConnection):
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", int(connection.stall_seconds), int(connection.stall_seconds % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with theirs, connection.log.open("ab") as log:
            self.log_start = log.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                [sys.executable, "-m", connection.module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**without_torchrun(os.environ), **connection.env},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pipe = Pipe(ours.detach())
        self.ended = os.pidfd_open(self.process.pid)  # readable once the process has ended
        self._end = weakref.finalize(self, _end, self.process, self.ended, os.getpid())  # also when the trainer exits

    def end(self) -> int:
        """Kill the whole process group; the status of its leader, negative for a signal."""
        self._end()
        self.pipe.close()
        return self.process.returncode


def without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """For a process that is none of the ranks: an environment that does not make it take itself for one."""
    of_ranks = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    return {name: value for name, value in environment.items() if not name.startswith(of_ranks)}


def _end(process: subprocess.Popen[bytes], ended: int, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer
        return
    os.close(ended)
    if process.returncode is None:  # not reaped yet, so that the number is still its own
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _value(message: Any) -> Any:
    if isinstance(message, Reply):
        return message.value
    assert isinstance(message, Problem), message
    if message.kind == "request":
        raise EngineError(message.text)
    raise EngineLost("out of memory" if message.kind == "out_of_memory" else "died", message.text)
