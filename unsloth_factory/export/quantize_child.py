"""The child process in which llama.cpp quantises: through cyllama's prebuilt library."""

from __future__ import annotations

from collections.abc import Callable

from unsloth_factory.inference.child import serve


def quantize(request: dict, _: Callable) -> dict:
    """Write one quantised file; llama.cpp reports failure as a bare code, so everything was checked before."""
    import cyllama.llama.llama_cpp as cy

    params = cy.LlamaModelQuantizeParams()
    params.ftype, params.nthread = request["ftype"], request["threads"]
    cy.model_quantize(request["source"], request["target"], params)
    return {}


def main() -> None:
    """Serve until the parent closes the pipe."""
    serve({"quantize": quantize})


if __name__ == "__main__":
    main()
