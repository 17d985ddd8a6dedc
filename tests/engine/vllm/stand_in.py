"""A stand-in for a vLLM server: its endpoints over real HTTP, no model, and faults on demand.

`python tests/engine/stand_in.py --port N` runs it as a program. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 256


class StandIn:
    """Serves `base` and loaded adapters; a completion depends on model, prompt and seed.

    `fault`, if set, is called with a good answer and returns what is sent instead: an object, text
    (sent as it is), a number (an HTTP status) or None (the connection is closed).
    """

    def __init__(self, port: int = 0, *, adapters_at_run_time: bool = True) -> None:
        self.adapters: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.fault: Callable[[dict[str, Any]], Any] | None = None
        self.api_key = ""
        self.context = 256
        self.scales_logprobs = True
        self.likeliest = {k: -1.0 - k for k in range(5)}
        self.adapters_at_run_time = adapters_at_run_time
        self.running = self.most_running = self.abandoned = 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._lock = threading.Lock()
        self.port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to listen, as a server does that has just been started: without adapters."""
        self.adapters = {}
        self._http = _Http(("127.0.0.1", self.port), _handler(self))
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Be gone at once: no new connection, and no answer on the old ones."""
        self._http.shutdown()
        self._http.server_close()
        self._http.drop_connections()

    def freeze(self) -> None:
        """As under SIGSTOP: connections are taken, nothing is answered."""
        self.goes_on.clear()

    def thaw(self) -> None:
        self.goes_on.set()

    def models(self) -> dict[str, Any]:
        base = {"id": "base", "parent": None, "root": "m", "max_model_len": self.context}
        loaded = [
            {"id": n, "parent": "base", "root": p, "max_model_len": None}
            for n, p in self.adapters.items()
        ]
        return {"object": "list", "data": [base, *loaded]}

    def completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        rng = random.Random(f"{asked['model']} {asked['prompt']} {asked['seed']}")
        count = rng.randint(1, min(6, asked["max_tokens"]))
        ids = [rng.randint(97, 122) for _ in range(count)]
        if count < asked["max_tokens"]:
            ids[-1] = END
        logprobs: dict[str, Any] = {"token_logprobs": [-rng.random() for _ in ids]}
        if asked["logprobs"]:
            scale = asked["temperature"] if self.scales_logprobs else 1.0
            tops = {f"token_id:{k}": value / scale for k, value in self.likeliest.items()}
            logprobs["top_logprobs"] = [tops for _ in ids]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if ids[-1] == END else "length",
            "prompt_token_ids": asked["prompt"],
            "token_ids": ids,
            "logprobs": logprobs,
        }
        return {"object": "text_completion", "model": asked["model"], "choices": [choice]}

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, address: Any) -> None:
        pass  # a client that went away


def _handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            server.goes_on.wait()
            if self.path == "/health":
                self._reply(200, "")
            elif self._is_allowed():
                self._reply(200, server.models())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.goes_on.wait()
            if not self._is_allowed():
                return
            if self.path == "/v1/completions":
                self._complete(asked)
            elif not server.adapters_at_run_time:
                self._reply(404, {"detail": "Not Found"})
            elif self.path == "/v1/load_lora_adapter":
                self._load(asked["lora_name"], asked["lora_path"])
            elif server.adapters.pop(asked["lora_name"], None) is None:
                self._error(404, f"The lora adapter '{asked['lora_name']}' cannot be found.")
            else:
                self._reply(200, "Success")

        def _load(self, name: str, path: str) -> None:
            if name in server.adapters:
                self._error(400, f"The lora adapter '{name}' has already been loaded.")
            else:
                server.adapters[name] = path
                self._reply(200, "Success")

        def _complete(self, asked: dict[str, Any]) -> None:
            is_probe = bool(asked["logprobs"])
            if not is_probe:
                server.requests.append(asked)
            if asked["model"] not in ("base", *server.adapters):
                self._error(404, f"The model `{asked['model']}` does not exist.")
                return
            if len(asked["prompt"]) + asked["max_tokens"] > server.context:
                self._error(400, f"This model's maximum context length is {server.context} tokens.")
                return
            with server.counted():
                while not is_probe and not server.may_answer.wait(0.01):
                    if _is_gone(self.connection):
                        server.abandoned += 1
                        return
                answer: Any = server.completion(asked)
                if server.fault is not None and not is_probe:
                    answer = server.fault(answer)
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
            elif isinstance(answer, int):
                self._error(answer, "an injected fault")
            else:
                self._reply(200, answer)

        def _is_allowed(self) -> bool:
            if server.api_key in ("", self.headers.get("Authorization", "")[len("Bearer ") :]):
                return True
            self._reply(401, {"error": "Unauthorized"})
            return False

        def _error(self, status: int, message: str) -> None:
            self._reply(status, {"error": {"message": message, "code": status}})

        def _reply(self, status: int, answer: Any) -> None:
            body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _is_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    sys.stderr.write("the stand-in starts\n")
    StandIn(parser.parse_args().port)
    time.sleep(600)
