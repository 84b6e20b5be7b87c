"""A stand-in for the Hugging Face hub: the part of its protocol that a download of one file uses, on a local port.

Only the network is not real here; huggingface-hub talks to it as it talks to the hub.
"""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Context manager; serves `content` as every file of every repository.

    Attributes:
        content: bytes. budget: bytes that all GETs together send before connections break off, or None.
        status, error: an answer to everything. etag: instead of the content's SHA-256.
        requests: (method, first byte that was asked for), in order.
    """

    def __init__(self, content):
        self.content = content
        self.budget = None
        self.status, self.error, self.etag = 200, "", ""
        self.requests = []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
                hub.requests.append((self.command, begin))
                content = hub.content[begin:] if hub.status == 200 else b""
                self.send_response(206 if begin and hub.status == 200 else hub.status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hub.etag or hashlib.sha256(hub.content).hexdigest()}"')
                self.send_header("Accept-Ranges", "bytes")
                if begin:
                    self.send_header("Content-Range", f"bytes {begin}-{len(hub.content) - 1}/{len(hub.content)}")
                if hub.error:
                    self.send_header("X-Error-Code", hub.error)
                self.end_headers()
                if body and content:
                    sent = content if hub.budget is None else content[: hub.budget]
                    self.wfile.write(sent)
                    if hub.budget is not None:
                        hub.budget -= len(sent)
                        self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
