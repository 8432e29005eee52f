from __future__ import annotations

import logging

from unsloth_factory.model.environment import versions
from unsloth_factory.model.noise import quiet_libraries


def test_versions_are_text():
    found = versions()
    assert {"python", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "cuda", "gpu"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_known_chatter_is_dropped_and_other_warnings_show(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING), quiet_libraries():
        logger.warning("Failed to load CPU gemm_4bit_forward from %s", "x")
        logger.warning("something a user should see")
    logger.warning("Failed to load CPU gemm_4bit_forward from %s", "y")
    assert [record.getMessage() for record in caplog.records] == [
        "something a user should see",
        "Failed to load CPU gemm_4bit_forward from y",
    ]


def test_progress_bars_are_as_before():
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    with quiet_libraries():
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()


def test_loading_prints_nothing(load, capfd):
    load(quantization_bit=4)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
