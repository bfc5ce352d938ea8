"""A stand-in for the engine process: answers as the real one does, quickly, and fails where it is told to.

``python -m tests.engine_child FD`` with a folder in ENGINE_CHILD. ``faults.json`` there is a list of [place, fault], of
which each happens once, also over several lives; a place is a command's name, or "generate:K", after K events of it.
Every command is noted in ``commands.jsonl``. Completions depend on the prompt, its seed, and the weights.

It runs without torch, so that it starts at once; so no tensor can be sent to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.blanks import without_torch

if __name__ == "__main__":
    without_torch()

from revisual_fast.rollout.engine import Sampling
from revisual_fast.rollout.messages import (
    Alive,
    Failed,
    Finished,
    Problem,
    Reply,
    Request,
)

VOCAB = 64
REFUSED, STUMBLES = 60, 61
"""First id of a prompt that always fails, and of one that fails the first time."""


class Child:
    def __init__(self, pipe: Connection, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.weights: dict[str, Any] = {}
        self.stumbled: set[tuple[int, ...]] = set()

    def serve(self) -> None:
        while True:
            try:
                command = self.pipe.recv()
            except EOFError:
                return
            self.note(command.name, command.kwargs)
            if command.name == "close":
                return
            if not self.fault(command.name):
                self.send(Reply(getattr(self, command.name)(**command.kwargs)))

    def send(self, message: Any) -> None:
        self.pipe.send_bytes(pickle.dumps(message))

    def note(self, name: str, kwargs: dict[str, Any]) -> None:
        about: Any = None
        if name == "generate":
            about = [r.index for r in kwargs["requests"]]
        elif name == "update_weights":
            about = sorted(kwargs["update_info"])
        elif name in ("sleep", "wake_up"):
            about = next(iter(kwargs.values()))
        with (self.folder / "commands.jsonl").open("a") as log:
            log.write(json.dumps([name, about]) + "\n")

    def fault(self, place: str) -> bool:
        """Whether the command is answered by a fault; some of them end this process."""
        faults = json.loads((self.folder / "faults.json").read_text())
        if not faults or faults[0][0] != place:
            return False
        (self.folder / "faults.json").write_text(json.dumps(faults[1:]))
        what = faults[0][1]
        if what == "slow":
            for _ in range(5):
                time.sleep(0.4)
                self.send(Alive())
            return False
        if what in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        elif what == "exit":
            print("I cannot go on like this", flush=True)
            sys.exit(3)
        self.send(Problem(what, f"a planned {what}"))
        return True

    # -- commands

    def start(self, settings: Any) -> int:
        return VOCAB

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> None:
        for done, request in enumerate(reversed(requests)):  # not in the order of the prompts
            if self.fault(f"generate:{done}"):
                return
            first, key = request.ids[0], tuple(request.ids)
            if first == REFUSED or (first == STUMBLES and key not in self.stumbled):
                self.stumbled.add(key)
                self.send(Failed(request.index, "a prompt like this"))
            else:
                self.send(self.complete(request, n, sampling))

    def complete(self, request: Request, n: int, sampling: Sampling) -> Finished:
        ids, masks = [], []
        for i in range(n):
            text = json.dumps([request.ids, request.seed, i, sampling.temperature, self.weights], sort_keys=True)
            stream = hashlib.sha256(text.encode()).digest()
            ids.append([byte % VOCAB for byte in stream[1 : 2 + stream[0] % sampling.max_tokens]])
            masks.append([[token, VOCAB - 1] for token in ids[-1]])
        return Finished(
            request.index,
            ids,
            [[-token / VOCAB for token in row] for row in ids],
            ["stop" if len(row) < sampling.max_tokens else "length" for row in ids],
            masks if sampling.masks else None,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.weights |= update_info

    def fingerprints(self, names: list[str]) -> dict[str, Any]:
        return {"workers": [self.weights], "mapping": {name: name for name in names}}

    def sleep(self, level: int) -> None:
        if level == 2:
            self.weights.clear()

    def wake_up(self, tags: Any) -> None:
        pass

    def memory(self) -> int:
        return len(self.weights)

    def echo(self, value: Any) -> Any:
        return value


if __name__ == "__main__":
    Child(Connection(int(sys.argv[1])), Path(os.environ["ENGINE_CHILD"])).serve()
