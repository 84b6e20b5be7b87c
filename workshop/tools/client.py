"""A client for ComfyUI's HTTP API: queue a prompt, follow it over the websocket, collect its outputs.

Its interface is synchronous. It knows nothing about this pack; the messages are those of ComfyUI's `/ws`, `/prompt` and
`/history`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from .terminal import Failure

Prompt = dict[str, dict]
"""ComfyUI's API format: node id -> {"class_type": str, "inputs": {name: value or [node id, output slot]}}."""


class PromptFailed(Failure):
    """A node raised an error, or the server refused the prompt."""


class PromptInterrupted(Failure):
    """The run was interrupted."""


@dataclass(frozen=True)
class Progress:
    """One message from a running prompt. `step` and `steps` are 0 when a node has just started."""

    node: str
    class_type: str
    step: int
    steps: int
    seconds: float
    """Seconds since the prompt was queued."""


@dataclass
class PromptResult:
    """The result of a finished prompt: the history's outputs per node, and every progress message in order."""

    prompt_id: str
    outputs: dict[str, dict] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)

    def step_seconds(self, node: str) -> list[float]:
        """Seconds of each step of a sampler node; the first counts from the node's start and includes model loading."""
        times = [message.seconds for message in self.progress if message.node == node]
        return [end - begin for begin, end in itertools.pairwise(times)]


class Client:
    """Talks to the server at `url`, for example http://127.0.0.1:8188."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client_id = uuid.uuid4().hex

    def get(self, path: str) -> dict:
        """The server's JSON response for `path`."""
        return json.loads(self.download(path))

    def download(self, path: str) -> bytes:
        """The server's raw response for `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict) -> dict:
        """Send `body` as JSON and return the JSON response ({} if it is empty)."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def interrupt(self) -> None:
        """Interrupt the running prompt."""
        self.post("/interrupt", {})

    def run(
        self,
        prompt: Prompt,
        on_progress: Callable[[Progress], None] = lambda _: None,
        timeout: float | None = None,
    ) -> PromptResult:
        """Queue `prompt`, wait until it has finished and return its outputs.

        Args:
            prompt: in API format.
            on_progress: called when a node starts and when a step ends.
            timeout: maximum number of seconds to wait.

        Raises:
            PromptFailed: a node failed, or the server refused the prompt; gives the node and its message.
            PromptInterrupted: the run was interrupted.
            Failure: the connection was lost, or the run took too long.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress), timeout))
        except asyncio.TimeoutError as error:
            raise Failure(f"ComfyUI did not finish the prompt within {timeout:g} s.") from error

    async def _run(self, prompt: Prompt, on_progress: Callable[[Progress], None]) -> PromptResult:
        import aiohttp  # only installed in the development environment

        address = f"{self.url}/ws?clientId={self.client_id}"
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                result = PromptResult(self._queue(prompt))
                began = time.monotonic()
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        continue  # previews are binary
                    event = json.loads(message.data)
                    data = event.get("data", {})
                    if data.get("prompt_id") != result.prompt_id:
                        continue
                    if event["type"] == "execution_success":
                        result.outputs = self._outputs(result.prompt_id)
                        return result
                    _raise_failure(event["type"], data)
                    progress = _progress(event["type"], data, prompt, time.monotonic() - began)
                    if progress is not None:
                        result.progress.append(progress)
                        on_progress(progress)
        except (aiohttp.ClientError, ConnectionError, urllib.error.URLError) as error:
            raise Failure(f"The connection to ComfyUI was lost: {error}") from error
        raise Failure("ComfyUI closed the connection before the prompt finished.")

    def _queue(self, prompt: Prompt) -> str:
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            raise PromptFailed(f"ComfyUI refused the prompt: {_refusal(error.read())}") from error
        if answer.get("node_errors"):  # ComfyUI still runs the outputs that do not depend on the nodes it refused
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            self.post("/interrupt", {"prompt_id": answer["prompt_id"]})
            raise PromptFailed(f"ComfyUI refused part of the prompt: {_reasons(answer)}")
        return answer["prompt_id"]

    def _outputs(self, prompt_id: str) -> dict[str, dict]:
        # ComfyUI writes the history shortly after sending the success message.
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]["outputs"]
            time.sleep(0.05)
        raise Failure("ComfyUI has no history of the prompt that just finished.")


def _progress(kind: str, data: dict, prompt: Prompt, seconds: float) -> Progress | None:
    node = data.get("node")
    if kind not in ("executing", "progress") or node is None:
        return None
    class_type = prompt.get(node, {}).get("class_type", "")
    return Progress(node, class_type, int(data.get("value", 0)), int(data.get("max", 0)), seconds)


def _raise_failure(kind: str, data: dict) -> None:
    if kind == "execution_interrupted":
        raise PromptInterrupted(f"The run was interrupted in node {data.get('node_id')} ({data.get('node_type')}).")
    if kind == "execution_error":
        message = str(data.get("exception_message", "")).strip()
        raise PromptFailed(f"Node {data.get('node_id')} ({data.get('node_type')}) failed: {message}")


def _refusal(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:300]
    return _reasons(answer) or answer.get("error", {}).get("message", "no reason given")


def _reasons(answer: dict) -> str:
    return "; ".join(
        f"node {node} ({found['class_type']}): {error['message']} ({error['details']})"
        for node, found in (answer.get("node_errors") or {}).items()
        for error in found["errors"]
    )
