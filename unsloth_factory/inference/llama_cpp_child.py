"""The child processes behind `llama_cpp.LlamaCpp`: one decodes through cyllama, one renders through xllamacpp's server.

Two processes because each library carries its own build of llama.cpp. Started by `child.ChildProcess`.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from unsloth_factory.inference.child import serve

GGML_TYPE_F32, FLASH_ATTENTION_OFF = 0, 0  # llama.cpp's enum values
CHUNK = 256  # tokens of one decode call; all-position logits hold CHUNK x V floats at a time
SMALLEST_CONTEXT = 1024


class Decoder:
    """A model and a context of llama.cpp, and the tokens that the context's cache holds."""

    def __init__(self) -> None:
        self.model: Any = None
        self.context: Any = None
        self.threads = 2
        self.exact = False
        self.cached: list[int] = []

    def open(self, request: dict, _: Callable) -> dict:
        """Load the weights and check them: llama.cpp itself loads a file full of NaNs and then answers nonsense."""
        import cyllama.llama.llama_cpp as cy

        class Model(cy.LlamaModel):
            """cyllama 0.2.18's get_logits_ith asks the model for n_vocab, which it lacks."""

            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        params = cy.LlamaModelParams()
        params.n_gpu_layers = request.get("gpu_layers", 0)
        params.check_tensors = True
        self.cy, self.threads, self.exact = cy, request["threads"], request["exact"]
        self.model = Model(path_model=request["path"], params=params, verbose=False)
        self.vocab = self.model.get_vocab()
        return {"n_vocab": self.vocab.n_vocab, "n_ctx_train": self.model.n_ctx_train}

    def _require_context(self, tokens: int) -> None:
        if self.context is not None and self.context.n_ctx >= tokens:
            return
        params = self.cy.LlamaContextParams()
        params.n_ctx = max(SMALLEST_CONTEXT, -(-tokens // 256) * 256)
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = self.threads
        if self.exact:
            params.type_k = params.type_v = GGML_TYPE_F32
            params.flash_attn_type = FLASH_ATTENTION_OFF
        self.context = self.cy.LlamaContext(model=self.model, params=params, verbose=False)
        self.batch = self.cy.LlamaBatch(n_tokens=CHUNK, embd=0, n_seq_max=1)
        self.cached = []

    def _forget(self, keep: int) -> None:
        """Drop the cached tokens from position `keep` on; all of them where the model's memory cannot be cut."""
        if keep == 0 or not self.context.memory_seq_rm(0, keep, -1):
            self.context.kv_cache_clear()
            keep = 0
        self.cached = self.cached[:keep]

    def _feed(self, ids: list[int], rows: int = 0) -> list[np.ndarray]:
        """Decode `ids` after the cached tokens; logits [V] after each of the last `rows` of them, copied.

        The logits after the very last token stay in the context too.
        """
        found = []
        first = len(ids) - max(rows, 1)
        for start in range(0, len(ids), CHUNK):
            piece = ids[start : start + CHUNK]
            self.batch.clear()
            for i, token in enumerate(piece):
                self.batch.add(token, len(self.cached) + i, [0], start + i >= first)
            self.context.decode(self.batch)
            self.cached += piece
            if rows:
                wanted = range(max(0, first - start), len(piece))
                found += [np.array(self.context.get_logits_ith(i), dtype=np.float32) for i in wanted]
        return found

    def _feed_prompt(self, ids: list[int], rows: int = 1) -> list[np.ndarray]:
        """Decode a whole prompt, but for the longest prefix that the cache already holds (same system prompt).

        Gives the logits after each of its last `rows` tokens, which are decoded in any case.
        """
        same = 0
        for ours, theirs in zip(self.cached, ids[: len(ids) - rows], strict=False):
            if ours != theirs:
                break
            same += 1
        self._forget(same)
        return self._feed(ids[same:], rows)

    def logits(self, request: dict, _: Callable) -> tuple[dict, bytes]:
        """Logits of every position, float32 [T, V], from an empty cache."""
        self._require_context(len(request["ids"]))
        self._forget(0)
        return _array(self._feed(request["ids"], len(request["ids"])))

    def tail_logits(self, request: dict, _: Callable) -> tuple[dict, bytes]:
        """Logits after each of the last tokens, float32 [last, V]; the prompt goes in as one batch."""
        self._require_context(len(request["ids"]))
        return _array(self._feed_prompt(request["ids"], request["last"]))

    def _sampler(self, request: dict) -> Any:
        sampler = self.cy.LlamaSampler(self.cy.LlamaSamplerChainParams())
        if request["temperature"] <= 0:
            sampler.add_greedy()
            return sampler
        if request["top_k"]:
            sampler.add_top_k(request["top_k"])
        sampler.add_top_p(request["top_p"], 1)
        sampler.add_temp(request["temperature"])
        sampler.add_dist(request["seed"])
        return sampler

    def generate(self, request: dict, send: Callable[[dict], None]) -> dict:
        """Tokens until a stop id or the limit; each is sent as an event when `stream` is set."""
        ids, stops = request["ids"], set(request["stop_ids"])
        self._require_context(len(ids) + request["max_new_tokens"])
        self._feed_prompt(ids)
        sampler = self._sampler(request)
        answer: list[int] = []
        while len(answer) < request["max_new_tokens"]:
            token = sampler.sample(self.context, -1)
            if token in stops:
                return {"ids": answer, "stopped": True}
            answer.append(token)
            if request["stream"]:
                send({"event": "token", "id": token})
            if len(answer) < request["max_new_tokens"]:
                self._feed([token])
        return {"ids": answer, "stopped": False}

    def tokenize(self, request: dict, _: Callable) -> dict:
        """Token ids of a text without BOS; control tokens in it are recognised on request."""
        return {"ids": list(self.vocab.tokenize(request["text"], False, request["parse_special"]))}

    def warm(self, request: dict, _: Callable) -> dict:
        """Whether the vocabulary puts a BOS token before every prompt."""
        return {"add_bos": bool(self.vocab.get_add_bos()), "bos": self.vocab.token_bos()}


def _array(rows: list[np.ndarray]) -> tuple[dict, bytes]:
    return {"shape": [len(rows), len(rows[0])]}, b"".join(row.tobytes() for row in rows)


class Renderer:
    """llama.cpp's own server on 127.0.0.1 with a random key, asked only what prompt it would make of messages."""

    def open(self, request: dict, _: Callable) -> dict:
        """Start the server on a port that the kernel picks."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = request["path"]
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.warmup, params.ui, params.endpoint_slots, params.use_jinja = False, False, False, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
        params.hostnames, params.port = ["127.0.0.1"], 0
        self.key = secrets.token_urlsafe(24)
        params.api_keys = [self.key]
        # The default "*" lets any web page that the user has open call the server.
        params.cors_origins = "http://127.0.0.1"
        self.server = xllamacpp.Server(params)
        self.address = self.server.listening_address.split("//", 1)[1]
        return {}

    def render(self, request: dict, _: Callable) -> dict:
        """The prompt that the server makes of messages."""
        body: dict[str, Any] = {"messages": request["messages"]}
        if request["enable_thinking"] is not None:
            body["chat_template_kwargs"] = {"enable_thinking": request["enable_thinking"]}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        connection = http.client.HTTPConnection(self.address, timeout=60)  # no proxy from the environment
        connection.request("POST", "/apply-template", json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"llama.cpp's server cannot render the chat: {answer}")
        return {"prompt": answer["prompt"]}


def main() -> None:
    """Serve as the decoder, or as the renderer when the first request says so."""
    decoder, renderer = Decoder(), Renderer()
    names = ("open", "logits", "tail_logits", "generate", "tokenize", "warm")
    handlers = {name: getattr(decoder, name) for name in names}
    serve({**handlers, "open_renderer": renderer.open, "render": renderer.render})


if __name__ == "__main__":
    main()
