"""A server that speaks as much of SandboxFusion's interface as a client can see, with its failure modes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeFusion:
    """``mode`` is changed by tests: "" runs programs; the others fail in the ways in which real servers do."""

    def __init__(self) -> None:
        self.mode, self.failures, self.requests, self.now, self.most = "", 0, [], 0, 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Quiet."""

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, body))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    failing = outer.failures > 0
                    outer.failures -= failing
                try:
                    status, text = outer.answer(body, failing)
                finally:
                    with lock:
                        outer.now -= 1
                if status == 0:
                    self.close_connection = True
                    return
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def answer(self, body: dict, failing: bool) -> tuple[int, str]:
        mode = self.mode or ("sandbox_error" if failing else "")
        run = {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": "", "stderr": ""}
        whole = {"status": "Success", "message": "", "compile_result": None, "run_result": run, "files": {}}
        if mode == "http_500":
            return 500, "Internal Server Error"
        if mode == "no_json":
            return 200, "<html>"
        if mode == "other_json":
            return 200, "[1]"
        if mode == "hangs_up":
            return 0, ""
        if mode == "sleeps":
            time.sleep(3)
        if mode == "sandbox_error":
            return 200, json.dumps({**whole, "status": "SandboxError", "message": "out of pods", "run_result": None})
        if mode == "silent":
            run.update(status="TimeLimitExceeded", return_code=None)
            return 200, json.dumps({**whole, "status": "Failed"})
        assert body["language"] == "python"
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", body["code"]],
                capture_output=True,
                timeout=body["run_timeout"],
                stdin=subprocess.DEVNULL,
            )
            run.update(return_code=done.returncode, stdout=done.stdout.decode(), stderr=done.stderr.decode())
            whole["status"] = "Failed" if done.returncode else "Success"
        except subprocess.TimeoutExpired as error:
            run.update(status="TimeLimitExceeded", return_code=None, stdout=(error.stdout or b"").decode())
            whole["status"] = "Failed"
        return 200, json.dumps(whole)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
