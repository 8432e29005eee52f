"""A request's JSON -> what is to be answered; what is not understood is refused in the interface's own form."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unsloth_factory.data.types import Turn
from unsloth_factory.inference.sampling import Sampling

MOST_STOPS = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "suffix": (None, ""),
    "echo": (None, False),
    "response_format": (None, {"type": "text"}),
    # of llama.cpp's server and of vLLM: they promise a form that would not be kept
    **dict.fromkeys(("grammar", "json_schema", "guided_json", "guided_regex", "guided_choice"), (None, "")),
}
"""Fields that are not supported -> values that ask for nothing. Any other value is refused, not passed over."""


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        message, kind, parameter, code: Of OpenAI's error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter, self.code, self.kind = status, message, parameter, code, kind

    def to_dict(self) -> dict[str, Any]:
        """{"error": {...}}."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the server uses where a request says nothing."""

    model: str
    max_new_tokens: int = 512
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    thinking: bool | None = None
    """Mode of the prompts, as trained."""
    system: str | None = None
    """System prompt of conversations without one, as trained."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer that is asked for."""

    turns: tuple[Turn, ...] = ()
    """Of a chat."""
    text: str | None = None
    """Of a plain completion; control tokens written in it are control tokens."""
    ids: tuple[int, ...] = ()
    """Of a plain completion whose prompt is tokens."""
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    streaming: bool
    with_usage: bool
    """The stream ends with the numbers of tokens."""
    thinking: bool | None

    @property
    def is_chat(self) -> bool:
        """Messages rather than text."""
        return bool(self.turns)


def read_chat(body: Mapping[str, Any], defaults: Defaults) -> Job:
    """The job of a chat completion.

    Raises:
        RequestError: A field has a value that is not understood.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages: a list with at least one message is needed.", parameter="messages")
    turns = tuple(_turn(message, f"messages[{number}]") for number, message in enumerate(messages))
    if defaults.system and all(turn.role != "system" for turn in turns):
        turns = (Turn("system", defaults.system), *turns)
    switches = body.get("chat_template_kwargs") or {}
    thinking = switches.get("enable_thinking", defaults.thinking) if isinstance(switches, dict) else None
    if thinking is not None and not isinstance(thinking, bool):
        raise RequestError(
            400, "chat_template_kwargs.enable_thinking: true or false.", parameter="chat_template_kwargs"
        )
    return Job(turns=turns, thinking=thinking, **_settings(body, defaults))


def read_completion(body: Mapping[str, Any], defaults: Defaults) -> Job:
    """The job of a plain completion.

    Raises:
        RequestError: A field has a value that is not understood.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt and _is_text(prompt):
        return Job(text=prompt, thinking=None, **_settings(body, defaults))
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return Job(ids=tuple(prompt), thinking=None, **_settings(body, defaults))
    raise RequestError(400, "prompt: one text that is not empty, or one list of token ids.", parameter="prompt")


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict) or str(message.get("role")) not in ROLES:
        raise RequestError(400, f"{where}: an object with role {', '.join(ROLES)} and content.", parameter=where)
    content = message.get("content")
    if isinstance(content, list):  # parts; pictures and sounds are not understood
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(map(str, texts)) if len(texts) == len(content) else None
    if not isinstance(content, str) or not _is_text(content):
        raise RequestError(400, f"{where}.content: text is needed.", parameter=f"{where}.content")
    return Turn(ROLES[str(message["role"])], content)  # type: ignore[arg-type]


def _is_text(text: str) -> bool:
    """JSON can write half of a surrogate pair, which is no character; tokenizers fail on it."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _settings(body: Mapping[str, Any], defaults: Defaults) -> dict[str, Any]:
    if body.get("model") not in (None, defaults.model):
        raise RequestError(
            404, f"There is no model {body['model']!r}; this server has {defaults.model!r}.", parameter="model",
            code="model_not_found",
        )  # fmt: skip
    for name, harmless in WITHOUT_EFFECT.items():
        if body.get(name) not in harmless:
            raise RequestError(400, f"{name}: not supported here.", parameter=name, code="unsupported_parameter")
    limit = body.get("max_completion_tokens")
    limit = body.get("max_tokens") if limit is None else limit
    if limit is not None and (type(limit) is not int or limit < 1):
        raise RequestError(400, "max_tokens: a whole number from 1 on.", parameter="max_tokens")
    seed = body.get("seed")
    if seed is not None and type(seed) is not int:
        raise RequestError(400, "seed: a whole number.", parameter="seed")
    options = body.get("stream_options") or {}
    return {
        "max_new_tokens": limit or defaults.max_new_tokens,
        "sampling": Sampling(
            temperature=_number(body, "temperature", defaults.temperature, 0, 2),
            top_p=_number(body, "top_p", defaults.top_p, 1e-6, 1),
            top_k=int(_number(body, "top_k", defaults.top_k, 0, 2**31 - 1)),
            seed=secrets.randbelow(2**31) if seed is None else seed % 2**31,
        ),
        "stops": _stops(body.get("stop")),
        "streaming": bool(body.get("stream")),
        "with_usage": isinstance(options, dict) and bool(options.get("include_usage")),
    }


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(400, f"{name}: a number from {low:g} to {high:g}.", parameter=name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(given, list) or len(given) > MOST_STOPS or not all(isinstance(s, str) and s for s in given):
        raise RequestError(400, f"stop: a text, or up to {MOST_STOPS} of them, none empty.", parameter="stop")
    return tuple(given)
