"""`uf chat`: talk to the model in the terminal, or line by line through a pipe."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.source import (
    ResolvedModel,
    gguf_template,
    load_source,
    require_same_tokenizer,
    resolve_source,
    system_prompt,
)
from unsloth_factory.config.commands import ChatConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.export.sums import verify_file
from unsloth_factory.inference.chat import AnswerStream, ChatSession, prompt_limit
from unsloth_factory.inference.interrupts import children_ignore_interrupts
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.stream import StreamEvent, decoder_of, events, gguf_tokens, stream

LEAVE, CLEAR = ("exit", "quit"), "clear"


def run(config: ChatConfig) -> int:
    """Open the model and answer until the user leaves."""
    console = Console()
    source = config.source
    if config.gguf and source.run is None and config.model.model is None:
        source = FinishedRun(run=run_of(Path(config.gguf)))
    resolved = resolve_source(source, config.model, quantization_bit=config.quantization_bit)
    with _engine(config, resolved, console) as (template, answer_stream, max_positions):
        thinking = config.generation.think_chain
        session = ChatSession(
            template=template,
            answer_stream=answer_stream,
            max_prompt_tokens=prompt_limit(max_positions, config.generation.max_new_tokens),
            system=system_prompt(resolved, config.system, config.domain),
            thinking=resolved.thinking if thinking is None else thinking,
            keep_context=not config.no_context,
        )
        talk(session, console)
    return 0


@contextmanager
def _engine(
    config: ChatConfig, resolved: ResolvedModel, console: Console
) -> Iterator[tuple[ChatTemplate, AnswerStream, int]]:
    """(template, answers, context length) of the loaded model or of the GGUF file."""
    limit = config.generation.max_new_tokens
    if config.gguf is None:
        loaded, template = load_source(resolved, _aside(console))

        def answer(prompt: list[int]) -> Iterator[StreamEvent]:
            return stream(loaded, prompt, stop_ids=template.stop_ids, max_new_tokens=limit, sampling=_sampling(config))

        yield template, answer, loaded.max_positions
        return
    template = gguf_template(resolved)
    verify_file(Path(config.gguf).expanduser())
    with children_ignore_interrupts():
        model = LlamaCpp(Path(config.gguf).expanduser())
    with model:
        require_same_tokenizer(model, template, resolved)

        chosen = config.generation.think_chain
        opened = template.opens_thinking(resolved.thinking if chosen is None else chosen)

        def answer_gguf(prompt: list[int]) -> Iterator[StreamEvent]:
            tokens = gguf_tokens(
                model, prompt, stop_ids=template.stop_ids, max_new_tokens=limit, sampling=_sampling(config)
            )
            return events(tokens, decoder_of(template.tokenizer), opened)

        yield template, answer_gguf, model.max_positions


def _sampling(config: ChatConfig) -> Sampling:
    """The sampling of one answer: the same question may be answered differently the next time."""
    settings = config.generation
    seed = secrets.randbelow(2**31)
    return Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, seed=seed)


def run_of(gguf: Path) -> str:
    """The run folder that a GGUF file lies in: RUN/gguf/NAME.gguf."""
    for folder in gguf.expanduser().resolve().parents[:2]:
        if (folder / "run.yaml").is_file():
            return str(folder)
    raise UsageError(
        f"--gguf {gguf} does not lie in a run folder. Give --run FOLDER or --model FOLDER too: its tokenizer and chat "
        "template make the prompts."
    )


def talk(session: ChatSession, console: Console) -> None:
    """Read messages and print answers until exit, quit or the end of the input."""
    if _interactive(console):
        console.print("exit or Ctrl-D leaves, clear forgets the conversation, Ctrl-C stops an answer", style="dim")
    for message in _messages(console):
        if message in LEAVE:
            return
        if message == CLEAR:
            session.clear()
            _aside(console).print("(the conversation is forgotten)", style="dim", highlight=False)
        elif message:
            _answer(session, message, console)


def _aside(console: Console) -> Console:
    """Where everything but answers goes: without a terminal to stderr, so that stdout holds answers alone."""
    return console if console.is_terminal else Console(stderr=True)


def _interactive(console: Console) -> bool:
    return console.is_terminal and sys.stdin.isatty()


def _messages(console: Console) -> Iterator[str]:
    """The user's lines, stripped."""
    if not _interactive(console):
        for line in sys.stdin:
            yield line.strip()
        return
    while True:
        try:
            yield console.input("[bold green]>[/] ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(exit or Ctrl-D leaves)", style="dim", highlight=False)


def _answer(session: ChatSession, message: str, console: Console) -> None:
    """Print one answer as it comes."""
    aside = _aside(console)
    previous = None
    try:
        with closing(session.ask(message)) as answer:
            for event in answer:
                if previous == "thinking" != event.kind:
                    aside.out("\n")
                if event.kind == "answer":
                    console.out(_printable(event.text), end="", highlight=False)
                elif event.kind == "thinking":
                    aside.out(_printable(event.text), end="", style="dim italic", highlight=False)
                else:
                    aside.out(f"({event.text})", style="yellow", highlight=False)
                previous = event.kind
        console.out("")
    except KeyboardInterrupt:
        console.out("\n(stopped)", style="dim", highlight=False)
    except UserError as error:
        aside.print(f"error: {error}", style="red", highlight=False, markup=False)


def _printable(text: str) -> str:
    """Without control characters: an answer must not steer the terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
