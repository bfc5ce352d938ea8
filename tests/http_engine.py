"""A stand-in for ``vllm serve``: the routes that are used, quickly, with faults where a prompt asks for one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from revisual_fast.rollout.vllm.server_checks import EXTENSION, ROUTES

BAD, SILENT, BREAKS = 50, 51, 52
"""First ids of prompts that are refused, never answered, or end the server."""


class Server(ThreadingHTTPServer):
    """Runs at once, until ``stop``. ``words`` is its vocabulary; ``config`` is merged into what it says of itself."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, words: list[str], port: int = 0, routes: tuple[str, ...] = ROUTES, **config: Any):
        self.words, self.routes = words, routes
        model = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs", "max_model_len": 64}
        self.config = {
            "model_config": model | config.pop("model_config", {}),
            "weight_transfer_config": {"backend": "host"},
            "parallel_config": {"worker_extension_cls": EXTENSION},
            **config,
        }
        self.weights: dict[str, Any] = {}
        self.label, self.tokens, self.asleep, self.healthy = "default", 0, False, True
        self.asked: list[tuple[str, Any]] = []
        self.release = threading.Event()
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone

    def answer(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if path == "/health":
            return (200, "") if self.healthy else (503, "")
        if path == "/openapi.json":
            return 200, {"paths": {route: {} for route in self.routes}}
        if path == "/server_info":
            return 200, {"vllm_config": self.config}
        if path == "/metrics":
            return 200, f'# HELP x\nvllm:generation_tokens_total{{model="m"}} {float(self.tokens)}\n'
        if path == "/is_sleeping":
            return 200, {"is_sleeping": self.asleep}
        if path == "/weight_info":
            return 200, {"weight_version": self.label}
        if path == "/detokenize":
            return 200, {"prompt": "".join(self.words[i] for i in body["tokens"] if i < len(self.words))}
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/collective_rpc":
            return self.rpc(body)
        return self.command(path, query, body)

    def command(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        self.asked.append((path, query or body))
        if path == "/update_weights":
            self.weights |= body["update_info"]
        elif path == "/finish_weight_update":
            self.label = body["weight_version"]
        elif path == "/sleep":
            self.asleep = True
        elif path == "/wake_up":
            self.asleep = False
        elif path not in self.routes:
            return 404, {"detail": "Not Found"}
        return 200, {"success": True, "world_size": 2}

    def rpc(self, body: Any) -> tuple[int, Any]:
        results = {"revisual_memory": ["5", "6"], "revisual_fingerprints": [self.weights]}
        if body["method"] == "revisual_names":
            return 200, {"results": [{name: name for name in body["args"][0]}]}
        return 200, {"results": results[body["method"]]}

    def generate(self, body: Any) -> tuple[int, Any]:
        ids, params = body["token_ids"], body["sampling_params"]
        if max(ids) >= len(self.words):
            return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary", "code": 400}}
        if params["max_tokens"] == 1:
            return 200, {}
        if ids[0] == BAD:
            return 400, {"error": {"message": "I do not like it", "code": 400}}
        if ids[0] == SILENT:
            self.release.wait(30)
        if ids[0] == BREAKS:
            self.healthy = False
            return 500, {"error": {"message": "CUDA out of memory", "code": 500}}
        choices = [
            {
                "index": i,
                "finish_reason": "stop",
                "token_ids": [ids[0], i],
                "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in (ids[0], i)]},
            }
            for i in reversed(range(params["n"]))
        ]
        self.asked.append(("generate", params))
        return 200, {"choices": choices}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply(json.loads(data) if data else None)

    def reply(self, body: Any) -> None:
        at = urlsplit(self.path)
        status, answer = self.server.answer(at.path, parse_qs(at.query), body)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass
