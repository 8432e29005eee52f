"""The stack of layers as one step of autograd, and in transformers' place inside its causal language model.

transformers keeps what it is good at: names, configuration, embedding, head, generation settings; peft keeps the LoRA
matrices. Between embedding and head this module computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from unsloth_factory.kernels import rms_norm
from unsloth_factory.kernels.attention import Documents
from unsloth_factory.kernels.shadows import Shadow, Shadows
from unsloth_factory.kernels.transfer import to_device
from unsloth_factory.model.fast.cached import cached_forward
from unsloth_factory.model.fast.embedding import HostEmbedding
from unsloth_factory.model.fast.flat import FlatAdapter
from unsloth_factory.model.fast.graphs import Graphs
from unsloth_factory.model.fast.layer import Layer, Row, Saved, Saving, add_norm_gradient
from unsloth_factory.model.fast.linear import FusedLinear, LoraPair
from unsloth_factory.model.fast.offload import HostInputs
from unsloth_factory.model.fast.planner import Planner
from unsloth_factory.model.fast.spec import DecoderSpec, RotaryTable
from unsloth_factory.model.fast.tail import Tail
from unsloth_factory.model.fast.trained import TrainedWeights

STREAMS = 4
"""Of random numbers, for a fused projection: it has three parts at most."""


class FastDecoder(nn.Module):
    """Takes the place of transformers' decoder; its parameters keep their names.

    Args:
        inner: transformers' decoder, whose embedding, norms and layer names are used.
        spec: Its shapes.
        stack: The frozen layers.
        device: Where they are.
    """

    def __init__(self, inner: Any, spec: DecoderSpec, stack: Sequence[Layer], device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = inner.embed_tokens
        self.layers = inner.layers
        self.norm = inner.norm
        self.config = inner.config
        self.spec = spec
        self.stack = tuple(stack)
        self.table = RotaryTable(inner.config, device)
        self.planner = Planner(spec, device)
        self._lora_layers: list[Any] = []
        self._shadows = Shadows([])
        self._device = device
        self.adapter: FlatAdapter | TrainedWeights = FlatAdapter([], device)
        """Where the LoRA matrices lie while they train; or the weights that train themselves."""
        self.first_trained = 0
        """The layers below it neither train nor let a gradient through."""
        self.host_inputs = HostInputs(device)
        """Where layers of `Saving.OFFLOAD` leave their inputs."""
        self.dropout = 0.0
        """LoRA's, while training."""
        self.graphs: Graphs | None = None
        """On a GPU: replayed instead of launching each kernel. None launches them."""

    def bind(self) -> None:
        """Take over the LoRA matrices that peft has put into the layers; call it after they were attached."""
        shadows: list[Shadow] = []
        self._lora_layers = [module for module in self.layers.modules() if hasattr(module, "lora_A")]
        for index, (names, layer) in enumerate(zip(self.layers, self.stack, strict=True)):
            for number, fused in enumerate(layer.projections.values()):
                fused.stream = STREAMS * (4 * index + number)
                modules = {part.name: names.get_submodule(part.name) for part in fused.parts}
                shadows += fused.attach({name: _pair(m) for name, m in modules.items() if hasattr(m, "lora_A")})
        self._shadows = Shadows(shadows)
        if not any(p.requires_grad for module in self._lora_layers for p in module.parameters()):
            return
        self.planner.extra = 2 * sum(fused.rank for fused in self.stack[0].projections.values())
        projections = [fused for layer in self.stack for fused in layer.projections.values()]
        self.adapter = FlatAdapter(projections, self._device)
        self.dropout = max((pair.dropout for fused in projections for pair in fused.pairs.values()), default=0.0)
        self.planner.dropout = self.dropout > 0
        if self._device.type == "cuda":
            self.graphs = Graphs(self)

    def refresh_shadows(self) -> None:
        """Bring the 16-bit copies of the LoRA matrices up to date."""
        self._shadows.refresh()  # 0.26 GB of traffic for an 8B model, 0.06 ms on an H200: not worth a memory of changes

    def randomize_shadows(self, generator: torch.Generator) -> None:
        """Until the next refresh the copies hold small random numbers, for `self_check`."""
        self._shadows.randomize(generator)

    def give_up_memory(self) -> None:
        """After memory ran out: free what is kept for speed, and plan with less from now on."""
        if self.graphs is not None:
            self.graphs.drop()
        self.host_inputs.release()
        self.planner.tighten()

    @property
    def trains_itself(self) -> bool:
        """Full or freeze fine-tuning."""
        return isinstance(self.adapter, TrainedWeights)

    @property
    def lora(self) -> bool:
        """There is an adapter, and it is switched on."""
        return bool(self._lora_layers) and not self._lora_layers[0].disable_adapters

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        index: torch.Tensor | None = None,
        **unused: Any,
    ) -> Any:
        """Final normed hidden states [B, T, h] as transformers returns them.

        Args:
            input_ids: int64 [B, T]
            position_ids: int64 [B, T]; without a cache a position 0 begins a document.
            attention_mask: 1 for real tokens, [B, T] (with a cache [B, cached + T]); None where all are real.
            past_key_values: A transformers cache, which grows by the new tokens; None for training and scoring.
            use_cache: Unused: a cache is used when it is given.
            index: int64 [n] positions in the B T of the batch: only their hidden states are made, [1, n, h]. Not with a
                cache.
            unused: Further arguments that transformers passes on.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast as Output

        self.refresh_shadows()
        with torch.autocast(self._device.type, enabled=False):  # which may be on for the sake of a trained head
            if past_key_values is not None:
                hidden = cached_forward(self, input_ids, position_ids, attention_mask, past_key_values)
            else:
                hidden = self._whole(input_ids, position_ids, attention_mask, index)
        output: Any = Output
        return output(last_hidden_state=hidden, past_key_values=past_key_values)

    def _whole(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        index: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states of whole sequences: all real tokens in one packed row, padding left out."""
        batch, width = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(width, device=input_ids.device).expand(batch, width)
        real = None if attention_mask is None else attention_mask.reshape(-1).nonzero()[:, 0]
        flat = [x.reshape(-1) if real is None else x.reshape(-1)[real] for x in (input_ids, position_ids)]
        device = self.norm.weight.device
        lengths = document_lengths(flat[1], None if real is None else real // width, width if real is None else None)
        positions = to_device(flat[1], device)
        row = Row(*self.table.of(positions), Documents.of(lengths, device))
        if index is not None:
            places = index if real is None else torch.searchsorted(real, index)
            return self._run(self.embed(flat[0]), row, to_device(places, device))[None]
        hidden = self._run(self.embed(flat[0]), row, None)
        if real is None:
            return hidden.view(batch, width, -1)
        spread = hidden.new_zeros(batch * width, hidden.shape[-1])
        return spread.index_copy(0, to_device(real, device), hidden).view(batch, width, -1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding on the device, [..., h], of ids int64 on either; in the computation dtype."""
        places = ids if isinstance(self.embed_tokens, HostEmbedding) else to_device(ids, self._device)
        return self.embed_tokens(places).to(self.stack[-1].qkv.dtype)

    def _run(self, x: torch.Tensor, row: Row, index: torch.Tensor | None) -> torch.Tensor:
        """[T, h] -> normed [n, h] of the positions in `index`, int64 [n] on the device; None: of all."""
        if torch.is_grad_enabled() and (self.lora or self.trains_itself):
            if self.dropout and self.training:  # from the CPU's generator, which checkpoints keep
                row = replace(row, seed=to_device(torch.randint(2**63 - 1, (1,)), self._device))
            if self.graphs is not None and self.graphs.takes(row):
                return self.graphs.run(x, row, index)
            if self.graphs is not None:
                self.graphs.give_way()
            anchor = torch.zeros((), device=x.device, requires_grad=True)
            return _chosen(_Stack.apply(anchor, self, x, row), index)
        if self.graphs is not None:
            self.graphs.make_room(len(x))
        with torch.no_grad():
            for layer in self.stack:
                x, _ = layer.forward(x, row, saving=None, lora=self.lora)
            return self.final_norm(_chosen(x, index))

    @property
    def tail(self) -> Tail:
        """What follows the last attention, for some positions."""
        return Tail(self.stack[-1], self.norm.weight)

    def final_norm(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The norm behind the last layer, [T, h], written into `out` where it is given."""
        return rms_norm.rms_norm(x, self.norm.weight, self.spec.eps, out)

    def forward_stack(self, x: torch.Tensor, row: Row, plan: Sequence[Saving]) -> tuple[torch.Tensor, list[Saved]]:
        """(output [T, h] of the last layer, what each layer keeps); those below `first_trained` keep nothing."""
        return self._forward_layers(x, row, plan)

    def attend_stack(
        self, x: torch.Tensor, row: Row, plan: Sequence[Saving]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Saved]]:
        """(input [T, h] of the last layer, what its `attend` made, what each layer keeps); the last one keeps all."""
        x, kept = self._forward_layers(x, row, plan[:-1])
        kept.append(Saved(x))
        return x, self.stack[-1].attend(x, row, kept[-1], arena=row.arena), kept

    def _forward_layers(self, x: torch.Tensor, row: Row, plan: Sequence[Saving]) -> tuple[torch.Tensor, list[Saved]]:
        """(output [T, h], what is kept) of as many layers as are planned, behind those below `first_trained`."""
        if row.arena is not None:
            row.arena.rewind()
        if Saving.OFFLOAD in plan:
            self.host_inputs.begin()
        kept = []
        for layer in self.stack[: self.first_trained]:
            x, _ = layer.forward(x, row, saving=None)
        layers = self.stack[self.first_trained :][: len(plan)]
        for layer, saving in zip(layers, plan, strict=True):
            away = self.host_inputs.send(x) if saving is Saving.OFFLOAD else None
            y, saved = layer.forward(x, row, saving=saving)
            assert saved is not None
            if away is not None:
                self.host_inputs.wait(away)  # only then may x's memory be another's
                saved.x, saved.away = x.new_empty(0), away
            x = y
            kept.append(saved)
        return x, kept

    def backward_stack(
        self, dhidden: torch.Tensor, last: torch.Tensor, saved: list[Saved], row: Row
    ) -> torch.Tensor | None:
        """Add up all gradients of the LoRA matrices, or of the weights that train themselves.

        Args:
            dhidden: Gradient at the normed hidden states, [T, h].
            last: Output of the last layer, [T, h].
            saved: Used up.
            row: As in the forward pass.

        Returns:
            The gradient at the stack's input, [T, h], where the embedding trains.
        """
        add_norm_gradient(self.norm.weight, dhidden, last, self.spec.eps)
        taker = self.stack[-1].down
        top = taker.output(len(last))
        rms_norm.rms_norm_backward(dhidden, last, self.norm.weight, self.spec.eps, out=taker.y_of(top))
        dx: list[torch.Tensor | None] = [top]
        del last, top  # 330 MB each of 40,000 tokens of Qwen3-8B
        bottom = self._backward_layers(dx, saved, row)
        return None if bottom is None else taker.y_of(bottom)

    def attend_backward_stack(
        self, dattended: torch.Tensor, residual: torch.Tensor, saved: list[Saved], row: Row
    ) -> None:
        """Add up all gradients of the LoRA matrices but those of the tail.

        Args:
            dattended: Gradient at what the last layer attended to, [T, Hq D].
            residual: Gradient at its input past its attention, [T, h].
            saved: Of `attend_stack`; used up.
            row: As in the forward pass.
        """
        dx = self.stack[-1].attend_backward(dattended, residual, saved.pop(), row, self._taker(len(self.stack) - 1))
        self._backward_layers([dx], saved, row)

    def _backward_layers(self, dx: list[torch.Tensor | None], saved: list[Saved], row: Row) -> torch.Tensor | None:
        """Gradient at the stack's input, as `_taker` has it, from that at the output of the last layer kept.

        Args:
            dx: It alone, taken out, so that nothing else holds on to it.
            saved: Used up.
            row: As in the forward pass.
        """
        above, copies = dx.pop(), any(one.away is not None for one in saved)
        try:
            self._fetch(saved)
            while saved:
                assert above is not None
                one, index = saved.pop(), self.first_trained + len(saved)
                if one.away is not None:
                    self.host_inputs.wait(one.away)
                self._fetch(saved)  # for the layer below, while this one computes
                above = self.stack[index].backward(above, one, row, self._taker(index))
        finally:
            if copies:  # otherwise a graph may be being recorded, and nothing outside of it may be waited for
                self.host_inputs.join()  # of a pass that failed a copy may still be on its way
        return above

    def _taker(self, index: int) -> FusedLinear | None:
        """The projection in whose `output` the gradient at a layer's input goes; None: nobody wants it."""
        if index > self.first_trained:
            return self.stack[index - 1].down
        # what goes into the first layer has the shape of what comes out of one
        return self.stack[-1].down if self.embed_tokens.weight.requires_grad else None

    def _fetch(self, saved: list[Saved]) -> None:
        """Bring the last one's input back if it is away."""
        if saved and saved[-1].away is not None:
            saved[-1].x = self.host_inputs.fetch(saved[-1].away)


class _Stack(torch.autograd.Function):
    """All layers and the last norm. The gradients of what trains in them go straight into its `.grad`."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, decoder: FastDecoder, x: torch.Tensor, row: Row) -> torch.Tensor:
        ctx.decoder, ctx.row = decoder, row
        last, ctx.saved = decoder.forward_stack(x, row, decoder.planner.plan(len(x)))
        ctx.last = [last]
        return decoder.final_norm(last)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, torch.Tensor | None, None]:
        assert ctx.saved, "a second backward pass: the saved tensors are gone"
        ctx.decoder.adapter.prepare()
        dx = ctx.decoder.backward_stack(gradients[0], ctx.last.pop(), ctx.saved, ctx.row)
        return None, None, dx, None


def _chosen(rows: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return rows if index is None else rows.index_select(0, index)


def _pair(module: Any) -> LoraPair:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    rate = getattr(module.lora_dropout["default"], "p", 0.0)  # peft has a torch.nn.Identity where there is none
    return LoraPair(a, b, module.scaling["default"], rate)


def document_lengths(positions: torch.Tensor, rows: torch.Tensor | None, width: int | None) -> list[int]:
    """Lengths of the documents of a flat row: one begins at position 0 and where another row of the batch begins.

    Args:
        positions: int64 [T]
        rows: int64 [T], number of the batch's row; None when all rows have `width` tokens.
        width: Tokens of each row.
    """
    total = len(positions)
    begins = positions == 0
    if rows is None:
        assert width is not None
        begins = begins | (torch.arange(total, device=positions.device) % width == 0)
    else:
        begins = begins | torch.cat([rows.new_ones(1, dtype=torch.bool), rows[1:] != rows[:-1]])
    starts = begins.nonzero()[:, 0].tolist()
    return [b - a for a, b in zip(starts, [*starts[1:], total], strict=True)]
