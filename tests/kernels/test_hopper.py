"""FlashAttention-4 is taken where it is there, fits and agrees with torch's; its own interface is stood in for."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unsloth_factory.kernels import attention, hopper
from unsloth_factory.kernels.attention import Attended, Documents

CPU = torch.device("cpu")


class Library:
    """Computes what FlashAttention-4's functions do, by plain torch, and checks how it was asked."""

    def __init__(self, wrong: float = 1.0, broken: bool = False) -> None:
        self.wrong, self.broken = wrong, broken
        self.calls = 0

    def documents(self, borders: torch.Tensor, longest: int, options: dict[str, Any]) -> Documents:
        self.calls += 1
        if self.broken:
            raise RuntimeError("ptxas said no")
        assert borders.dtype == torch.int32
        assert options["cu_seqlens_k"] is borders
        assert options["max_seqlen_k"] == longest
        assert options["causal"] is True
        lengths = (borders[1:] - borders[:-1]).tolist()
        assert longest >= max(lengths)
        return Documents(tuple(lengths), borders)

    def _flash_attn_fwd(self, q, k, v, *, cu_seqlens_q, max_seqlen_q, softmax_scale, return_lse, **options):
        assert softmax_scale == q.shape[-1] ** -0.5
        assert return_lse
        attended = attention._plain(q, k, v, self.documents(cu_seqlens_q, max_seqlen_q, options))
        return attended.out * self.wrong, attended.lse, None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, *, softmax_scale, cu_seqlens_q, max_seqlen_q, **options
    ):  # fmt: skip
        documents = self.documents(cu_seqlens_q, max_seqlen_q, options)
        return attention._plain_backward(dout, q, k, v, Attended(out, lse), documents)


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on an H100: the choice of kernels alone, with FlashAttention-2 stood in for by plain torch."""

    def install(library: Library | None, capability: tuple[int, int] = (9, 0)) -> Library | None:
        def missing() -> Any:
            raise ModuleNotFoundError("flash_attn")

        monkeypatch.setattr(hopper, "_library", missing if library is None else lambda: library)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "backend", lambda device: "flash")
        for name, stand_in in (("forward", torchs_forward), ("backward", torchs_backward)):
            monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{name}", stand_in)
        hopper.works.cache_clear()
        return library

    yield install
    hopper.works.cache_clear()


def torchs_forward(q, k, v, borders, _borders, *_, **__):
    attended = attention._plain(q, k, v, Documents(tuple((borders[1:] - borders[:-1]).tolist()), borders))
    return attended.out, attended.lse, "seed", "offset", None


def torchs_backward(dout, q, k, v, out, lse, borders, *_, **__):
    documents = Documents(tuple((borders[1:] - borders[:-1]).tolist()), borders)
    return attention._plain_backward(dout, q, k, v, Attended(out, lse), documents)


def rows(tokens: int, size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, heads, size, generator=generator) for heads in (4, 2, 2, 4)]


def used(library: Library, lengths: list[int], size: int = 64) -> bool:
    """Whether an attention of these documents went to it; results are always those of plain torch."""
    documents = Documents.of(lengths, CPU)
    q, k, v, dout = rows(sum(lengths), size)
    attention.prepare((4, 2), size, q.dtype, CPU)
    before = library.calls
    attended = attention.attention(q, k, v, documents)
    gradients = attention.attention_backward(dout, q, k, v, attended, documents)
    plain = attention._plain(q, k, v, documents)
    wanted = attention._plain_backward(dout, q, k, v, plain, documents)
    for mine, other in zip((attended.out, *gradients), (plain.out, *wanted), strict=True):
        torch.testing.assert_close(mine, other)
    return library.calls > before


def test_it_takes_what_it_was_made_for(hopper_gpu: Any) -> None:
    library = hopper_gpu(Library())
    assert used(library, [520, 3, 40])
    assert not used(library, [500, 11])  # too short: other kernels
    assert not used(library, [600], size=80)
    assert not used(library, [600] + [1] * 256)


def test_the_trial_comes_before_the_graph(hopper_gpu: Any) -> None:
    library = hopper_gpu(Library())
    attention.prepare((4, 2), 64, torch.float32, CPU)
    assert library.calls == 2
    assert used(library, [520])
    assert library.calls == 2 + 2


@pytest.mark.parametrize(
    ("library", "capability"),
    [(Library(wrong=1.05), (9, 0)), (Library(broken=True), (9, 0)), (Library(), (8, 0)), (Library(), (10, 0))],
    ids=["wrong", "broken", "A100", "B200"],
)
def test_torch_s_own_is_taken_otherwise(hopper_gpu: Any, library: Library, capability: tuple[int, int]) -> None:
    hopper_gpu(library, capability)
    assert not used(library, [520, 3])
    assert library.calls <= 2  # tried once, at most


def test_where_it_is_not_installed(hopper_gpu: Any) -> None:
    hopper_gpu(None)
    assert not used(Library(), [520, 3])
    assert not hopper.works(CPU, torch.float32, (4, 2), 64)


def test_memory_that_runs_out_in_the_trial_is_no_verdict(hopper_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = hopper_gpu(Library())

    def full(*_: Any) -> SimpleNamespace:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(library, "documents", full)
    with pytest.raises(torch.OutOfMemoryError):
        hopper.works(CPU, torch.float32, (4, 2), 64)
    monkeypatch.undo()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_as_exact_as_flash_attention_2(dtype: torch.dtype) -> None:
    """Each error against float32 at most 1.2 times the older kernel's."""
    device = torch.device("cuda")
    if not hopper.works(device, dtype, (8, 2), 128):
        pytest.skip("FlashAttention-4 is not installed, or this is no Hopper GPU")
    generator = torch.Generator(device).manual_seed(3)
    lengths = [700, 1, 1300, 65]
    documents = Documents.of(lengths, device)
    q, k, v, dout = (
        torch.randn(sum(lengths), heads, 128, generator=generator, device=device).to(dtype) for heads in (8, 2, 2, 8)
    )
    exact = attention._plain(*(x.float() for x in (q, k, v)), documents)
    wanted = [exact.out, *attention._plain_backward(dout.float(), q.float(), k.float(), v.float(), exact, documents)]
    found = []
    for newer in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "takes", lambda *_, newer=newer: newer)
            attended = attention.attention(q, k, v, documents)
            gradients = attention.attention_backward(dout, q, k, v, attended, documents)
            found.append([attended.out, *gradients])
    for mine, older, true in zip(*found, wanted, strict=True):
        mine_off, older_off = ((x.float() - true).norm() / true.norm() for x in (mine, older))
        assert mine_off <= 1.2 * older_off, (mine_off, older_off)


def test_what_it_compiles_is_kept_in_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled, folder = (f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR"))
    for name in (enabled, folder):
        monkeypatch.setenv(name, "given")
        monkeypatch.delenv(name)
    monkeypatch.setattr(hopper, "import_module", lambda name: name)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert hopper._library() == "flash_attn.cute.interface"
    assert enabled not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path))
    hopper._library()
    assert os.environ[enabled] == "1"
    assert Path(os.environ[folder]).is_relative_to(tmp_path)
    assert Path(os.environ[folder]).is_dir()
    monkeypatch.setenv(enabled, "0")
    hopper._library()
    assert os.environ[enabled] == "0"
