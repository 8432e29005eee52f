"""Run the factory from a checkout: `python cli.py sft ...` is `uf sft ...`."""

from unsloth_factory.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
