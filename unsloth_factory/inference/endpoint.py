"""A client of servers that speak OpenAI's chat interface: vLLM, llama.cpp's server, Ollama, `uf serve`, hosted ones.

Plain HTTP(S) to the address that the user names and nowhere else: no proxy, no redirect. The key is taken from an
environment variable for each request; it is never stored, printed or put into an error.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from unsloth_factory.config.errors import UsageError, UserError

ATTEMPTS = 6
LONGEST_PAUSE = 60.0
"""Seconds between two attempts, whatever the server's Retry-After says."""
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
LARGEST_REPLY = 64 << 20
Message = Mapping[str, str]
"""role and content."""


@dataclass(frozen=True)
class Reply:
    """One answer of the server."""

    text: str
    reasoning: str | None = None
    """Where the server gives it apart (reasoning_content)."""
    finished: bool = True
    """False when the limit of tokens cut it off."""
    prompt_tokens: int = 0
    """0 where the server does not count."""
    completion_tokens: int = 0
    seconds: float = 0.0
    first_token: Mapping[str, float] = field(default_factory=dict)
    """Likeliest first tokens -> log-probability, where they were asked for (logprobs, top_logprobs) and are given."""


class RequestRefused(UserError):
    """The server answered that it will not do this request; others may go through."""


class EndpointDown(UserError):
    """No request can go through: nobody answers, or the key or the model is wrong."""


class Endpoint:
    """One server and one of its models. Threads may share it.

    Args:
        url: http://HOST:PORT/v1, with or without the v1.
        model: Name of the model; None takes the server's only one.
        key_variable: Environment variable that holds the key; it need not be set.
        timeout: Seconds that one attempt may take.
        flag: The flag that the address came from, for messages.
        sleep: Waits between attempts (a test's clock).

    Raises:
        UsageError: The address is none.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key_variable: str = "UF_API_KEY",
        timeout: float = 300.0,
        flag: str = "--endpoint",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._host, self._port, self._path, self._kind = _address(url, flag)
        self.url = f"{'https' if self._kind is http.client.HTTPSConnection else 'http'}://{self._host}:{self._port}"
        self.url += self._path
        self._key_variable, self._timeout, self._flag, self._sleep = key_variable, timeout, flag, sleep
        self._limit_name = "max_tokens"
        self._no_temperature = False
        self._unknown: set[str] = set()
        self._answered = threading.Event()
        self.model = model or self._only_model()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: The turns.
            max_tokens: Longest answer, tokens.
            temperature: 0 for the likeliest answer.
            top_p: Nucleus sampling; None leaves it to the server.
            seed: Of the sampling, for servers that take one.
            extra: Further fields of the request.

        Raises:
            RequestRefused: The server will not do this one, or every attempt failed.
            EndpointDown: No request can go through.
        """
        started = time.monotonic()
        while True:
            body: dict[str, Any] = {"model": self.model, "messages": [dict(m) for m in messages]}
            body |= {name: value for name, value in (extra or {}).items() if name not in self._unknown}
            body[self._limit_name] = max_tokens
            optional = {"temperature": None if self._no_temperature else temperature, "top_p": top_p, "seed": seed}
            body |= {name: value for name, value in optional.items() if value is not None}
            try:
                return _reply(self._post("/chat/completions", body), time.monotonic() - started)
            except RequestRefused as error:
                if not self._adapted(str(error), body, extra or {}):
                    raise

    def _adapted(self, reason: str, sent: Mapping[str, Any], extra: Mapping[str, Any]) -> bool:
        """Newer hosted models refuse max_tokens, any temperature but their own, and fields that they do not know.

        True if it is worth another try. What counts is what this request had sent: another thread may have learnt the
        same meanwhile.
        """
        unknown = {name for name in extra if name in sent and name in reason}
        if "max_completion_tokens" in reason and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"
        elif "temperature" in reason and "temperature" in sent:
            self._no_temperature = True
        elif unknown:
            self._unknown |= unknown
        else:
            return False
        return True

    def models(self) -> list[str]:
        """Names of the models that the server offers.

        Raises:
            EndpointDown: Nobody answers.
        """
        found = self._post("/models", None).get("data")
        return [str(entry.get("id")) for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def _only_model(self) -> str:
        names = self.models()
        if len(names) != 1:
            listed = ", ".join(names[:20]) or "none"
            raise UsageError(f"{self._flag} {self.url}: which model? Give {self._flag}_model; it offers: {listed}.")
        return names[0]

    def _post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object that the server answers; attempts follow each other with growing pauses."""
        reason = ""
        for attempt in range(ATTEMPTS):
            pause = 0.0
            try:
                status, wanted, value = self._request(path, body)
            except ConnectionRefusedError:
                if not self._answered.is_set():
                    raise EndpointDown(
                        f"{self._flag} {self.url}: nobody answers there. Is the server started?"
                    ) from None
                reason = "nobody answers"
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__} {error}".strip()
            else:
                self._answered.set()
                if status == 200 and isinstance(value, dict):
                    return value
                reason = self._without_key(f"{status} {_reason(value)}" if status != 200 else "no JSON object")
                self._refuse(status, reason)
                pause = wanted
            if attempt + 1 < ATTEMPTS:
                # Half of the pause is by chance, so that requests that failed together do not come back together.
                backoff = min(LONGEST_PAUSE, 2.0**attempt) * (0.5 + random.random() / 2)
                self._sleep(min(LONGEST_PAUSE, max(pause, backoff)))
        raise RequestRefused(f"{self.url}{path}: {ATTEMPTS} attempts failed, the last one with: {reason}.")

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self._key_variable, "").strip()
        return text.replace(key, "***") if key else text  # servers quote the key that they refuse

    def _refuse(self, status: int, reason: str) -> None:
        if status in (401, 403):
            raise EndpointDown(
                f"{self.url} refuses the key: {reason}. It is read from the environment variable {self._key_variable} "
                f"({'set' if os.environ.get(self._key_variable) else 'not set'})."
            )
        if status == 404:
            raise EndpointDown(f"{self.url}: {reason}. Check the address (it ends in /v1) and {self._flag}_model.")
        if status != 200 and status not in TRY_AGAIN:
            raise RequestRefused(f"{self.url}: {reason.rstrip('.')}.")

    def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, float, Any]:
        """(status, seconds that the server asks to wait, value) of one attempt; value is None where it is no JSON."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(self._key_variable, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        connection = self._kind(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("GET" if data is None else "POST", self._path + path, data, headers)
            response = connection.getresponse()
            text = response.read(LARGEST_REPLY)
            wait = 0.0
            with suppress(ValueError):
                wait = float(response.headers.get("Retry-After") or 0)
            value = None
            with suppress(ValueError):
                value = json.loads(text)
            return response.status, wait, value
        finally:
            connection.close()


def _address(url: str, flag: str) -> tuple[str, int, str, Any]:
    """(host, port, path, connection type)."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        # The address may hold a key by mistake: it is not repeated.
        raise UsageError(f"{flag}: an address such as http://127.0.0.1:8000/v1 is expected, without key or query.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return parts.hostname, port, path or "/v1", kind


def _reply(value: dict[str, Any], seconds: float) -> Reply:
    """What a chat completion says."""
    try:
        choice = value["choices"][0]
        message = choice["message"]
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(text, str):
            raise TypeError
        usage = value.get("usage") or {}
        return Reply(
            text,
            str(reasoning) if reasoning else None,
            choice.get("finish_reason") != "length",
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            seconds,
            _first_token(choice.get("logprobs")),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise RequestRefused(f"The server's answer is no chat completion: {json.dumps(value)[:200]}.") from None


def _first_token(logprobs: Any) -> dict[str, float]:
    """Token -> log-probability of the first position."""
    positions = logprobs.get("content") if isinstance(logprobs, dict) else None
    top = positions[0].get("top_logprobs") if positions else None
    return {str(entry["token"]): float(entry["logprob"]) for entry in top or []}


def _reason(value: Any) -> str:
    """The server's words: OpenAI's {"error": {"message": ...}} or what there is, shortened."""
    error = value.get("error", value) if isinstance(value, dict) else value
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message if message is not None else "").split())[:300]
