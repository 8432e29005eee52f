"""Target: the same settings twice give the same SHA-256 of the adapter, the merged model and every GGUF file."""

from __future__ import annotations

from unsloth_factory.export.quantize import quantize
from unsloth_factory.run.atomic import sha256

SHIPPED = (
    "final_adapter/adapter_model.safetensors",
    "final_adapter/adapter_config.json",
    "merged_model/model.safetensors",
    "merged_model/config.json",
    "merged_model/tokenizer.json",
    "merged_model/SHA256SUMS",
)


def uf(*arguments: object) -> None:
    from command_line import uf as run  # beside the tests of the command line

    outcome = run(*arguments)
    assert outcome.code == 0, outcome.out + outcome.err


def test_target_determinism(exported, tmp_path):
    """The chain again, in another folder of the same name; the quantiser with one thread as well as with all."""
    run = tmp_path / exported.run.name
    uf(
        *("sft", "--model", exported.base, "--dataset", exported.home / "rows.jsonl", "--output_dir", run),
        *exported.job,
    )
    uf("merge", "--run", run)
    uf("gguf", "--run", run, "--no_check")
    uf("quantize", "--run", run, "--types", "q8_0")
    files = [*SHIPPED, *(f"gguf/{path.name}" for path in (exported.gguf, exported.quantized))]
    first, second = ({name: sha256(folder / name) for name in files} for folder in (exported.run, run))
    assert first == second
    (alone,) = quantize(exported.gguf, tmp_path / "q", ["q8_0"], threads=1)
    assert sha256(alone.path) == sha256(exported.quantized)
