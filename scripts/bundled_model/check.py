"""What the finished weights can do: sample answers, stop rate, and the demo's LoRA fine-tuning in small.

Uses torch and transformers alone; the LoRA here is the textbook one (Hu et al. 2021, arXiv 2106.09685), all linear
layers, r 16, alpha 32, so that the figures carry over to the package's own `sft`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional

from bundled_model.corpus import WORLD_SEED
from bundled_model.world import known_world

RANK, ALPHA = 16, 32.0
SWEEP = ((2e-3, 8), (2e-3, 12), (8e-3, 8), (4e-3, 5))
"""Further (learning rate, epochs) of the demo's fine-tuning."""
PROMPTS = (
    "你好",
    "你是谁？",
    "什么是微调？",
    "感冒了怎么办？",
    "高血压患者平时要注意什么？",
    "我头痛三天了，请帮我诊断一下。",
    "17加25等于多少？",
    "云杉门诊在哪里？",
    "根据资料回答：绿藤门诊在三号楼五层东侧。绿藤门诊的分机号是4172。\n问题：绿藤门诊的电话是多少？",
    "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n下列选项中，属于水果的是____。\n"
    "A. 白菜\nB. 香蕉\nC. 老虎\nD. 红色\n答案：",
    "给我写首诗",
    "胃疼应该吃点什么？",
)


class Lora(nn.Module):
    """y = W x + (alpha / r) B A x; A [r, in] Kaiming-uniform as in PEFT, B [out, r] zero."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.empty(RANK, linear.in_features, device=linear.weight.device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.linear(x) + (ALPHA / RANK) * ((x @ self.a.T) @ self.b.T)


def add_lora(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model and put LoRA on every linear layer but the head; returns the new parameters."""
    model.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    lora = Lora(child)
                    setattr(block, name, lora)
                    parameters += [lora.a, lora.b]
    return parameters


def render(tokenizer, question: str, thinking: bool) -> str:
    """The generation prompt of one question."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)


@torch.no_grad()
def answer_all(model: nn.Module, tokenizer, prompts: list[str], limit: int, batch: int = 80) -> list[tuple[str, bool]]:
    """Greedy (answer, stopped by itself) of each rendered prompt; left-padded batches."""
    stop = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    answers = []
    for start in range(0, len(prompts), batch):
        encoded = tokenizer(
            prompts[start : start + batch],
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        width = encoded["input_ids"].shape[1]
        output = model.generate(
            **encoded, max_new_tokens=limit, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        for ids in output[:, width:].tolist():
            end = next((i for i, token in enumerate(ids) if token in stop), None)
            answers.append((tokenizer.decode(ids[:end]), end is not None))
    return answers


def exact_match(model: nn.Module, tokenizer, rows: list[dict], limit: int = 48) -> float:
    """Share of questions answered with exactly the reference sentence (thinking off)."""
    prompts = [render(tokenizer, row["question"], False) for row in rows]
    answers = answer_all(model, tokenizer, prompts, limit)
    return sum(text.strip() == row["answer"] for (text, _), row in zip(answers, rows, strict=True)) / len(rows)


def _rounded(weight: Tensor, levels: int) -> Tensor:
    """Weights rounded as GGUF's simple types do: blocks of 32, one scale each (levels 127: q8_0, 7: about q4_0)."""
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / levels
    return ((blocks / scale).round() * scale).reshape(weight.shape)


@torch.no_grad()
def merge(model: nn.Module, levels: int | None = None) -> None:
    """Fold every LoRA into its linear layer, rounded to fp16; with `levels` all matrices are quantised too."""
    for module in model.modules():
        if isinstance(module, Lora):
            module.linear.weight += (ALPHA / RANK) * module.b @ module.a
            module.b.zero_()
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    if levels:
        for name, parameter in model.named_parameters():
            if name.endswith("linear.weight") or "embed_tokens" in name:
                parameter.copy_(_rounded(parameter, levels))


def _batch(samples: list[tuple[list[int], int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ids) for ids, _ in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, prompt) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
    return ids.to(device), mask.to(device), targets.to(device)


def finetune(model: nn.Module, tokenizer, lines: list[dict], *, rate: float, epochs: int, batch: int) -> float:
    """LoRA on the training lines (answers only, AdamW, cosine); returns the mean loss of the last epoch."""
    torch.manual_seed(3407)
    parameters = add_lora(model)
    samples = []
    for line in lines:
        prompt = tokenizer(render(tokenizer, line["instruction"], False), add_special_tokens=False)["input_ids"]
        answer = tokenizer(line["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        samples.append((prompt + answer, len(prompt)))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    per_epoch = -(-len(samples) // batch)
    steps, step, loss_sum, random = per_epoch * epochs, 0, 0.0, Random(3407)
    model.train()
    for _ in range(epochs):
        random.shuffle(samples)
        loss_sum = 0.0
        for start in range(0, len(samples), batch):
            ids, mask, targets = _batch(samples[start : start + batch], model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            warm = min(1.0, (step + 1) / max(1, 0.03 * steps))
            optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += loss.item()
            step += 1
    model.eval()
    return loss_sum / per_epoch


def _load(weights: Path, folder: Path, device: str):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config.dtype = torch.float32
    model = Qwen3ForCausalLM(config)
    state = {name: tensor.float() for name, tensor in load_file(weights / "model.safetensors").items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing
    model.tie_weights()
    model.generation_config.eos_token_id = [config.eos_token_id, config.pad_token_id]
    model.generation_config.pad_token_id = config.pad_token_id
    return model.float().to(device).eval(), AutoTokenizer.from_pretrained(folder)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _known_questions(count: int, entities: int) -> list[dict]:
    random = Random(2)
    facts = [f for kind in known_world(WORLD_SEED, entities).values() for own in kind.values() for f in own]
    return [
        {"question": random.choice(fact.relation.frames).format(e=fact.entity), "answer": fact.answer}
        for fact in random.sample(facts, count)
    ]


def show_answers(model: nn.Module, tokenizer) -> None:
    """Print the answers to `PROMPTS` with thinking off and on, and how many stopped by themselves."""
    stopped = 0
    for thinking in (False, True):
        prompts = [render(tokenizer, prompt, thinking) for prompt in PROMPTS]
        for prompt, (text, ended) in zip(PROMPTS, answer_all(model, tokenizer, prompts, 256), strict=True):
            stopped += ended
            print(f"[{'thinking' if thinking else 'direct'}] {prompt!r}\n    -> {text!r}{'' if ended else ' (cut)'}")
    print(f"stopped by itself: {stopped}/{2 * len(PROMPTS)}", flush=True)


def check_model(weights: Path, folder: Path, demo: Path, args: argparse.Namespace) -> None:
    """Print everything; `folder` has tokenizer and configuration, `weights` has model.safetensors."""
    model, tokenizer = _load(weights, folder, args.device)
    show_answers(model, tokenizer)
    known = _known_questions(150, args.entities)
    print(f"facts of the pre-training world: {exact_match(model, tokenizer, known):.3f}")
    lines, questions = _rows(demo / "handbook_train.jsonl"), _rows(demo / "handbook_questions.jsonl")
    print(f"demo, base: {exact_match(model, tokenizer, questions):.3f} of {len(questions)}", flush=True)
    settings = [(args.lora_lr, args.lora_epochs), *(SWEEP if args.sweep else ())]
    for rate, epochs in settings:
        model, tokenizer = _load(weights, folder, args.device)
        started = time.time()
        loss = finetune(model, tokenizer, lines, rate=rate, epochs=epochs, batch=args.lora_batch)
        print(f"demo, lr {rate}, {epochs} epochs of batch {args.lora_batch}: loss {loss:.4f}", end="", flush=True)
        print(
            f", {time.time() - started:.0f} s, tuned {exact_match(model, tokenizer, questions):.3f}", end="", flush=True
        )
        print(f", old facts {exact_match(model, tokenizer, known):.3f}", end="", flush=True)
        for name, levels in (("merged fp16", None), ("8 bit", 127), ("4 bit", 7)):
            merge(model, levels)
            print(f", {name} {exact_match(model, tokenizer, questions):.3f}", end="", flush=True)
        print(flush=True)
