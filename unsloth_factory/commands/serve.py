"""`uf serve`: the model behind an OpenAI-compatible address, until Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.chat import run_of
from unsloth_factory.commands.source import (
    ResolvedModel,
    gguf_template,
    load_source,
    require_same_tokenizer,
    resolve_source,
    system_prompt,
)
from unsloth_factory.config.commands import ServeConfig
from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import FinishedRun
from unsloth_factory.export.sums import verify_file
from unsloth_factory.inference.generate import stream_tokens
from unsloth_factory.inference.interrupts import children_ignore_interrupts
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.server.engine import Engine
from unsloth_factory.inference.server.http import LOOPBACK, ModelServer
from unsloth_factory.inference.server.requests import Defaults
from unsloth_factory.inference.stream import gguf_tokens


def run(config: ServeConfig) -> int:
    """Open the model and answer requests until Ctrl-C or SIGTERM."""
    console = Console()
    source = config.source
    if config.gguf and source.run is None and config.model.model is None:
        source = FinishedRun(run=run_of(Path(config.gguf)))
    resolved = resolve_source(source, config.model, quantization_bit=config.quantization_bit)
    with open_engine(config, resolved, console) as engine:
        server = open_server(config, resolved, engine, console)
        _announce(server, config, console)
        try:
            with _terminated_like_interrupted():
                server.serve_forever()
        except KeyboardInterrupt:
            console.print("stopping", highlight=False)
        finally:
            server.stop()
    return 0


@contextmanager
def open_engine(config: ServeConfig, resolved: ResolvedModel, console: Console) -> Iterator[Engine]:
    """The loaded model, or the GGUF file in a child process."""
    if config.gguf is None:
        loaded, template = load_source(resolved, console)

        def tokens(prompt: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
            return stream_tokens(loaded, prompt, stop_ids=template.stop_ids, max_new_tokens=limit, sampling=sampling)

        yield Engine(template, tokens, loaded.max_positions)
        return
    template = gguf_template(resolved)
    path = Path(config.gguf).expanduser()
    verify_file(path)
    with children_ignore_interrupts():
        model = LlamaCpp(path)
    with model:
        require_same_tokenizer(model, template, resolved)

        def gguf(prompt: list[int], limit: int, sampling: Sampling) -> Iterator[int]:
            return gguf_tokens(model, prompt, stop_ids=template.stop_ids, max_new_tokens=limit, sampling=sampling)

        yield Engine(template, gguf, model.max_positions)


def open_server(config: ServeConfig, resolved: ResolvedModel, engine: Engine, console: Console) -> ModelServer:
    """The server, listening.

    Raises:
        UserError: The address cannot be had.
    """
    generation = config.generation
    defaults = Defaults(
        model=config.name or _name(config, resolved),
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        thinking=resolved.thinking if generation.think_chain is None else generation.think_chain,
        system=system_prompt(resolved, config.system, config.domain),
    )
    try:
        return ModelServer(
            (config.host, config.port),
            engine,
            defaults,
            key=os.environ.get(config.serve_key_env, "").strip() or None,
            most_waiting=config.max_waiting,
            on_request=lambda line: console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True),
        )
    except OSError as error:
        taken = " Another program has the port; give another one: --port." if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"--host {config.host} --port {config.port}: {error.strerror or error}.{taken}") from None


def _name(config: ServeConfig, resolved: ResolvedModel) -> str:
    if config.gguf:
        return Path(config.gguf).stem
    return resolved.folder.path.resolve().name if resolved.folder else Path(str(resolved.settings.model)).name


def _announce(server: ModelServer, config: ServeConfig, console: Console) -> None:
    host = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
    url = f"http://{host}:{server.server_port}/v1"
    line = f"{server.defaults.model} answers at {url} (one request at a time; Ctrl-C stops)"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if config.host not in LOOPBACK and server.key is None:
        warning = f"anyone who reaches {config.host} can use it: put a key into the environment variable "
        console.print(f"{warning}{config.serve_key_env}", style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
