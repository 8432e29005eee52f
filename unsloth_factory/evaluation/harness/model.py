"""Tasks of lm-evaluation-harness on our loaded model: same prompts and metrics as the harness', our way of computing.

The harness (Gao et al. 2023, https://github.com/EleutherAI/lm-evaluation-harness) is optional, and imported when a task
of it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.generate import AT_ONCE, Progress, generate
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.score import continuation_logprobs
from unsloth_factory.model.loaded import LoadedModel

PREFIX = "lm_eval:"
INSTALL = "pip install 'lm-eval==0.4.13'"
LONGEST = 256
"""Longest generated answer of a task that names none, tokens; the harness' own default."""
BLOCK = 64
"""Tokens after which unfinished answers are searched for the task's stop strings."""


def require_harness() -> None:
    """Raise where the harness is not installed.

    Raises:
        UserError: With the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"--task {PREFIX}... runs tasks of lm-evaluation-harness, which is not installed: {INSTALL}")


def harness_model(
    loaded: LoadedModel, template: ChatTemplate, *, thinking: bool | None = None, batch_size: int | None = None
) -> Any:
    """The harness' LM of a loaded model.

    Args:
        loaded: The model (within `loaded.adapter_disabled()` it answers as the base).
        template: Renders prompts where the evaluation applies the chat template; its stop tokens end an answer.
        thinking: enable_thinking of such prompts; what is thought is taken from the answers.
        batch_size: Answers generated together (default: 8), or most rows scored together (default: as is quickest).
    """
    from lm_eval.api.model import TemplateLM

    return type("HarnessModel", (HarnessMethods, TemplateLM), {})(loaded, template, thinking, batch_size)


class HarnessMethods:
    """What the harness asks of a language model; `harness_model` joins it with the harness' own class."""

    cache_hook: Any
    backend = "causal"

    def __init__(
        self, loaded: LoadedModel, template: ChatTemplate, thinking: bool | None, batch_size: int | None
    ) -> None:
        super().__init__()
        self._loaded, self._template, self._thinking = loaded, template, thinking
        self.tokenizer = loaded.tokenizer
        self.batch_size = batch_size
        self.on_progress: Progress | None = None

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        eos = self.tokenizer.eos_token_id
        return int(self._template.stop_ids[0] if eos is None else eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-sequence token where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """The model's context, tokens."""
        return self._loaded.max_positions

    @property
    def tokenizer_name(self) -> str:
        """Tells caches apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Its Jinja text."""
        return self._template.source if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; without generation prompt its last turn is the answer's beginning."""
        turns = [Turn(message["role"], message["content"]) for message in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return self._template.render_prompt(turns, self._thinking)
        return self._template.render_prompt(turns[:-1], self._thinking) + turns[-1].content

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the beginning-of-sequence token gets no second one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each (texts, context ids, continuation ids); long contexts lose their start."""
        pairs = []
        for _texts, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise UserError(f"A continuation of {len(continuation)} tokens; 1 to {self.max_length} fit the model.")
            room = self.max_length + 1 - len(continuation)
            pairs.append((context[-room:], continuation))
        answers = continuation_logprobs(self._loaded, pairs, at_once=self.batch_size, on_progress=self.on_progress)
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context where it is longer."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, found):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop string of each request, the end of the answer, or its limit."""
        from lm_eval.models.utils import normalize_gen_kwargs

        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            settings = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], LONGEST))
            texts = self._answers([requests[number].args[0] for number in numbers], settings)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _answers(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        longest = int(settings["max_gen_toks"])
        room = self.max_length - longest
        if room < 1:
            raise UserError(
                f"The task asks for answers of {longest} tokens; the model's context has {self.max_length}. "
                "Give a smaller --max_new_tokens."
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        stops = [stop for stop in settings.get("until") or [] if stop]
        sampling = Sampling(
            temperature=float(settings.get("temperature") or 0.0),
            top_p=float(settings.get("top_p") or 1.0),
            top_k=int(settings.get("top_k") or 0),
        )
        given: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        # Drawn answers are not drawn in pieces: each piece would begin its random stream anew.
        block = longest if sampling.temperature or not stops else BLOCK
        while going:
            pieces = generate(
                self._loaded,
                [[*prompts[row], *given[row]] for row in going],
                stop_ids=self._template.stop_ids,
                max_new_tokens=min(block, longest - len(given[going[0]])),
                sampling=sampling,
                batch_size=self.batch_size or AT_ONCE,
            )
            for row, piece in zip(going, pieces, strict=True):
                given[row] += piece.ids
            going = [
                row
                for row, piece in zip(going, pieces, strict=True)
                if not piece.stopped and len(given[row]) < longest and not self._ended(given[row], stops)
            ]
            if self.on_progress:
                self.on_progress(len(prompts) - len(going), len(prompts))
        return [self._cut(ids, stops) for ids in given]

    def _text(self, ids: list[int]) -> str:
        """The answer, thinking taken away where the prompt asked for some."""
        if self._thinking:
            return self._template.decode_answer(ids, True)[1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _ended(self, ids: list[int], stops: Sequence[str]) -> bool:
        text = self._text(ids)
        return any(stop in text for stop in stops)

    def _cut(self, ids: list[int], stops: Sequence[str]) -> str:
        text = self._text(ids)
        for stop in stops:
            text = text.split(stop)[0]
        return text
