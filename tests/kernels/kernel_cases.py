"""Every Triton kernel against its plain-torch twin, and every twin's backward pass against autograd.

Run by test_kernels.py: on a CPU in a process of its own with TRITON_INTERPRET=1, on a GPU as it is.
"""

from __future__ import annotations

import os

import pytest
import torch

from unsloth_factory.kernels import (
    attention,
    cross_entropy,
    dropout,
    float8,
    nf4,
    nf4_float8,
    rms_norm,
    rotary,
    shadows,
    swiglu,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OLD_GPU = DEVICE.type == "cuda" and torch.cuda.get_device_capability() < float8.CAPABILITY
needs_float8 = pytest.mark.skipif(OLD_GPU, reason="GPUs before RTX 40 and H100 have no float8")
needs_triton = pytest.mark.skipif(not TRITON, reason="runs the Triton kernels: needs TRITON_INTERPRET=1 or a GPU")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def close(actual: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Relative error of the whole tensor; both are finite."""
    assert actual.shape == wanted.shape
    assert torch.isfinite(actual).all()
    size = wanted.float().norm().clamp(min=1e-3)  # what should be 0 is compared absolutely
    error = (actual.float() - wanted.float()).norm() / size
    assert error <= TOLERANCE[dtype] * factor, f"{error:.2e}"


SHAPES = [(1, 8), (3, 100), (5, 257), (2, 4096)]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_kernel(shape, dtype):
    x, w, dy, r = (draw(*s, dtype=dtype, seed=i) for i, s in enumerate([shape, shape[1:], shape, shape]))
    wide = torch.full((shape[0], shape[1] + 3), 7.0, dtype=dtype, device=DEVICE)
    rms_norm.launch_forward(x, w, 1e-6, wide[:, :-3])
    close(wide[:, :-3], rms_norm.twin(x, w, 1e-6), dtype)
    assert (wide[:, -3:] == 7.0).all()
    for residual in (r, None):
        ours = rms_norm.launch_backward(dy, x, w, 1e-6, residual, wide[:, :-3])
        close(ours, rms_norm.twin_backward(dy, x, w, 1e-6, residual), dtype)


def test_rms_norm_backward_is_the_gradient():
    x, w, dy = draw(5, 33).requires_grad_(), draw(33, seed=1).requires_grad_(), draw(5, 33, seed=2)
    rms_norm.twin(x, w, 1e-6).backward(dy)
    close(rms_norm.twin_backward(dy, x.detach(), w.detach(), 1e-6, None), x.grad, torch.float32)
    close(rms_norm.weight_gradient(dy, x.detach(), 1e-6), w.grad, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 100), (2, 1025)])
def test_swiglu_kernel(shape, dtype):
    gate_up, dout = draw(shape[0], 2 * shape[1], dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    close(swiglu.launch_forward(gate_up, torch.empty_like(dout)), swiglu.twin(gate_up), dtype)
    wide = torch.full((shape[0], 2 * shape[1] + 5), 7.0, dtype=dtype, device=DEVICE)
    ours, wanted = wide[:, :-5], gate_up.clone()
    ours.copy_(gate_up)
    close(swiglu.launch_backward(dout.clone(), ours), swiglu.twin_backward(dout.clone(), wanted), dtype)
    close(ours, wanted, dtype)
    assert (wide[:, -5:] == 7.0).all()


def test_swiglu_backward_is_the_gradient():
    gate_up, dout = draw(4, 14).requires_grad_(), draw(4, 7, seed=1)
    out = swiglu.twin(gate_up)
    out.backward(dout)
    gradient = gate_up.detach().clone()
    close(swiglu.twin_backward(dout, gradient), out.detach(), torch.float32)
    close(gradient, gate_up.grad, torch.float32)


SEED = torch.tensor([2**45 + 77], device=DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 101), (2, 1026)])
def test_dropout_kernel(shape, dtype):
    wide = draw(shape[0], shape[1] + 3, dtype=dtype)
    x, total = wide[:, :-3], draw(*shape, dtype=dtype, seed=1)
    wanted = dropout.twin(x, 0.3, SEED, 5)
    ours = dropout.launch(x, 0.3, SEED, 5, torch.full(shape, 7.0, dtype=dtype, device=DEVICE), add=False)
    assert torch.equal(ours == 0, wanted == 0)
    close(ours, wanted, dtype)
    added = (total.float() + dropout.twin(x.float(), 0.3, SEED, 5)).to(dtype)
    close(dropout.launch(x, 0.3, SEED, 5, total.clone(), add=True), added, dtype)


def test_random_words_are_philox():
    """Known answers of Random123's own tests (kat_vectors: philox4x32, 10 rounds)."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    known = {
        (0, (0, 0, 0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0x299F31D0_A4093822, pi): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        (-1, (ones,) * 4): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    for (seed, counter), words in known.items():
        found = dropout.philox(torch.tensor([seed]), [torch.tensor([word]) for word in counter])
        assert tuple(int(word) for word in found) == words


def test_dropout_keeps_what_it_should():
    ones = torch.ones(400, 250, device=DEVICE)
    kept = dropout.dropout(ones, 0.2, SEED, 0)
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    others = [dropout.dropout(ones, 0.2, SEED, 1), dropout.dropout(ones, 0.2, SEED + 1, 0), kept.roll(1, 0)]
    for one in (kept, *others):  # six standard deviations of 100,000 draws are 0.0076
        assert abs(float((one == 0).float().mean()) - 0.2) < 0.0076
    for other in (*others, kept.roll(1, 1), kept.roll(63, 1)):  # independent: both drop a number 4 times in 100
        assert abs(float(((kept == 0) & (other == 0)).float().mean()) - 0.04) < 0.004
    assert torch.equal(dropout.dropout(ones, 0.2, SEED, 0), kept)
    assert torch.equal(dropout.dropout(ones, 0.0, SEED, 0), ones)
    assert torch.equal(dropout.add_dropout(2 * ones, ones, 0.2, SEED, 0), kept + 2)


HEADS = [rotary.Heads(4, 2, 16), rotary.Heads(3, 1, 24), rotary.Heads(1, 1, 64)]


def rotary_inputs(heads: rotary.Heads, dtype: torch.dtype, tokens: int = 5):
    qkv = draw(tokens, heads.width, dtype=dtype)
    angles = draw(tokens, heads.size // 2, seed=1, scale=3.0)
    norm = rotary.HeadNorm(draw(heads.size, dtype=dtype, seed=2), draw(heads.size, dtype=dtype, seed=3), 1e-6)
    gradients = (
        draw(tokens, heads.queries, heads.size, dtype=dtype, seed=4),
        draw(tokens, heads.keys, heads.size, dtype=dtype, seed=5),
        draw(tokens, heads.keys, heads.size, dtype=dtype, seed=6),
    )
    return qkv, angles.cos(), angles.sin(), norm, gradients


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("normed", [True, False])
def test_rotary_kernel(heads, dtype, normed):
    qkv, cos, sin, norm, gradients = rotary_inputs(heads, dtype)
    norm = norm if normed else None
    for actual, wanted in zip(
        rotary.launch_forward(qkv, cos, sin, heads, norm), rotary.twin(qkv, cos, sin, heads, norm), strict=True
    ):
        close(actual, wanted, dtype)
    wanted = rotary.twin_backward(gradients, qkv, cos, sin, heads, norm)
    wide = torch.full((len(qkv), heads.width + 8), 7.0, dtype=dtype, device=DEVICE)
    wide[:, :-8] = qkv
    close(rotary.launch_backward(gradients, wide[:, :-8], cos, sin, heads, norm), wanted, dtype)
    assert (wide[:, -8:] == 7.0).all()


@pytest.mark.parametrize("normed", [True, False])
def test_rotary_backward_is_the_gradient(normed):
    heads = HEADS[0]
    qkv, cos, sin, norm, gradients = rotary_inputs(heads, torch.float32)
    qkv.requires_grad_()
    q, k = rotary.twin(qkv, cos, sin, heads, norm if normed else None)
    v = rotary.split(qkv, heads)[2]
    torch.autograd.backward([q, k, v], list(gradients))
    ours = rotary.twin_backward(gradients, qkv.detach(), cos, sin, heads, norm if normed else None)
    close(ours, qkv.grad, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 8192, 9001])
def test_cross_entropy_kernel(vocabulary, dtype):
    logits = draw(3, vocabulary, dtype=dtype, scale=4.0)
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2], device=DEVICE)
    ours, twins = logits.clone(), logits.clone()
    close(cross_entropy.launch(ours, targets, 8.0), cross_entropy.twin(twins, targets, 8.0), torch.float32, factor=2.0)
    close(ours, twins, dtype)
    kept = logits.clone()
    cross_entropy.launch(kept, targets, None)
    assert torch.equal(kept, logits)


def test_cross_entropy_gradient_is_the_gradient():
    logits, targets = draw(4, 11).requires_grad_(), torch.tensor([0, 10, 3, 3], device=DEVICE)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss.sum().backward()
    buffer = logits.detach().clone()
    close(cross_entropy.twin(buffer, targets, 2.0), loss.detach(), torch.float32)
    close(buffer, 2.0 * logits.grad, torch.float32)


def packed(shapes: list[tuple[int, int]]) -> tuple[nf4.Packed, torch.Tensor]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from unsloth_factory.model.fast.quantize import stack

    parts, values = [], []
    for seed, shape in enumerate(shapes):
        codes, state = quantize_4bit(draw(*shape, seed=seed), blocksize=64, compress_statistics=True, quant_type="nf4")
        parts.append((codes, state))
        values.append(dequantize_4bit(codes, state))
    return stack(parts), torch.cat(values)


NF4_SHAPES = [[(4, 64)], [(64, 192), (3, 192), (65, 192)], [(257, 128), (300, 128)]]


@pytest.mark.parametrize("shapes", NF4_SHAPES)
def test_nf4_twin_has_the_values_of_bitsandbytes(shapes):
    weight, wanted = packed(shapes)
    actual = nf4.twin(weight, torch.empty(weight.shape, device=DEVICE))
    assert torch.equal(actual, wanted)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", NF4_SHAPES)
def test_nf4_kernel(shapes, dtype):
    weight, _ = packed(shapes)
    rows, columns = weight.shape
    out = torch.full((rows, columns + 8), 7.0, dtype=dtype, device=DEVICE)
    nf4.launch(weight, out[:, :columns])
    wanted = nf4.twin(weight, torch.empty(weight.shape, dtype=dtype, device=DEVICE))
    if DEVICE.type == "cuda":
        assert torch.equal(out[:, :columns], wanted)
    else:  # the interpreter cuts float32 off where a GPU rounds it
        close(out[:, :columns], wanted, dtype, factor=0.3)
    assert (out[:, columns:] == 7.0).all()


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of float8 numbers that differ; none by more than one step."""
    first, second = one.float(), other.float()
    if DEVICE.type == "cpu":  # where rounding up carries into the exponent the interpreter forgets to: 127 becomes 64
        first = torch.where(second == 2 * first, second, first)
    step = torch.maximum(first.abs(), second.abs()) / 8 + 2**-8
    assert ((first - second).abs() <= step).all()
    return float((first != second).float().mean())


@needs_float8
@needs_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shapes", NF4_SHAPES)
def test_nf4_to_float8_kernel(shapes, transposed):
    weight, factor = nf4_float8.scaled(packed(shapes)[0])
    ours, wanted = nf4_float8.launch(weight, transposed), nf4_float8.twin(weight, transposed)
    assert ours.shape == wanted.shape
    assert steps_apart(ours, wanted) <= (0 if DEVICE.type == "cuda" else 0.01)


@pytest.mark.parametrize("shapes", NF4_SHAPES)
def test_nf4_to_float8_uses_its_whole_range(shapes):
    original, values = packed(shapes)
    weight, factor = nf4_float8.scaled(original)
    found = nf4_float8.twin(weight, False).float()
    assert float(found.abs().max()) == float8.MOST
    close(found * factor, values, torch.float16, factor=15)  # 3 bits of mantissa: 2.7 %
    assert torch.equal(nf4_float8.twin(weight, True).float().t(), found)


FLOAT8_SHAPES = [(1, 16), (5, 100), (3, 4096), (2, 9000)]


@needs_float8
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FLOAT8_SHAPES)
def test_float8_rows_kernel(shape, dtype):
    x = draw(shape[0], shape[1] + 8, dtype=dtype)[:, :-8]
    x[0] *= 1e3
    x[-1, 0] = 0
    (ours, scales), (wanted, wanted_scales) = float8.launch(x), float8.twin(x)
    assert torch.allclose(scales, wanted_scales, rtol=1e-6)
    assert steps_apart(ours, wanted) <= 0.01


def test_float8_rows_have_scales_of_their_own():
    x = draw(4, 300)
    x[1] *= 1e4
    x[2] = 0
    found, scales = float8.twin(x)
    for row in (0, 1, 3):
        close(found[row].float() * scales[row], x[row], torch.float16, factor=15)
    assert not found[2].float().any()
    assert torch.isfinite(found.float()).all()


@needs_float8
def test_float8_product():
    """As torch's own operation has it, which a GPU runs: factors, scales and layouts mean the same."""
    x, matrix = draw(33, 64, dtype=torch.bfloat16), draw(48, 64, seed=1)
    rows, scales = float8.twin(x)
    weights = (matrix * 100).to(float8.FLOAT8)
    exact = x.float() @ matrix.t()
    columns = torch.full((1, 48), 0.01, device=DEVICE)
    theirs = torch._scaled_mm(rows, weights.t(), scales, columns, out_dtype=torch.bfloat16)
    ours = (rows.float() @ weights.float().t() * scales * 0.01).to(torch.bfloat16)
    close(theirs, ours, torch.bfloat16)
    close(float8.product(rows, scales, weights, 0.01, torch.bfloat16), ours, torch.bfloat16)
    close(theirs, exact, torch.bfloat16, factor=3)


@needs_triton
@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("shapes", NF4_SHAPES)
def test_nf4_kernel_copies_a_matrix_beside_or_below(shapes, below):
    weight, _ = packed(shapes)
    rows, columns = weight.shape
    extra = draw(8, columns, seed=3) if below else draw(rows, 16, seed=3)
    found = []
    for make in (nf4.launch, nf4.twin):
        matrix = torch.full((rows + 8, columns) if below else (rows, columns + 16), 7.0, device=DEVICE)
        place = matrix[rows:] if below else matrix[:, columns:]
        make(weight, matrix[:rows, :columns], (extra, place))
        assert torch.equal(place, extra)
        found.append(matrix)
    close(found[0], found[1], torch.float32, factor=0.3)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_shadows_kernel(dtype):
    big = torch.zeros(40, 24, dtype=dtype, device=DEVICE)
    sources = [
        torch.nn.Parameter(draw(40, 16)),
        torch.nn.Parameter(draw(40, 8, seed=1)),
        torch.nn.Parameter(draw(3, 700)),
    ]
    row = torch.zeros(3, 700, dtype=dtype, device=DEVICE)
    copies = [shadows.Shadow(big[:, :16], sources[0], 2.0), shadows.Shadow(big[:, 16:], sources[1], 1.0)]
    group = shadows.Shadows([*copies, shadows.Shadow(row, sources[2], 1.0)])
    for _ in range(2):
        group._launch()
        close(big[:, :16], 2.0 * sources[0].detach(), dtype)
        close(big[:, 16:], sources[1].detach(), dtype)
        close(row, sources[2].detach(), dtype)
        sources[2].data = draw(3, 700, seed=9)  # another place in memory


LENGTHS = [[2], [5, 1, 9], [33, 64]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE.type == "cpu" else [torch.float16, torch.bfloat16])
def test_attention(lengths, dtype):
    total = sum(lengths)
    q, k, v = (draw(total, heads, 32, dtype=dtype, seed=i) for i, heads in enumerate([4, 2, 2]))
    dout = draw(total, 4, 32, dtype=dtype, seed=4)
    documents = attention.Documents.of(lengths, DEVICE)
    attended = attention.attention(q, k, v, documents)
    gradients = attention.attention_backward(dout, q, k, v, attended, documents)
    reference = [x.float().requires_grad_() for x in (q, k, v)]
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        rows = [x[part].transpose(0, 1)[None] for x in reference]
        out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        close(attended.out[part], out[0].transpose(0, 1).detach(), dtype)
        out.backward(dout[part].float().transpose(0, 1)[None])
        start += length
    for actual, wanted in zip(gradients, reference, strict=True):
        close(actual, wanted.grad, dtype, factor=2.0)
