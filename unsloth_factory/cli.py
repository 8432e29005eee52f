"""The command line: one parse, and the chosen command imported only then (the table is config/table.py)."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import textwrap
from typing import Literal, get_args, get_origin

from unsloth_factory import __version__
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.fields import Setting, settings_of
from unsloth_factory.config.parse import parse, suggestion
from unsloth_factory.config.table import COMMANDS, Command
from unsloth_factory.config.values import without_none


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 (fine), 1 (failed), 2 (wrong usage), 130 or 143 (stopped, resumable)."""
    # Waiting OpenMP threads sleep instead of spinning: on two cores shared with another job, 60 steps of the bundled
    # model took 264 s spinning and 15 s sleeping (on idle cores 80 steps take 8 s and 14 s, and larger models do not
    # notice); results are the same. libgomp reads it when torch is imported, and the user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv is not None:
        return _exit_code(list(argv))
    atexit.register(_hush_bindings)  # registered first, so that it runs last
    code = _exit_code(sys.argv[1:])
    _prepare_exit()
    return code


def _hush_bindings() -> None:
    """Triton's bindings list what was not collected before the end, which is all of it (see `_prepare_exit`)."""
    if "triton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _prepare_exit() -> None:
    """All is written. A signal that still comes must not look like a training that was stopped half-way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Python looks for cycles among all objects before it ends: with torch and transformers 2.6 s of 2.9 on busy cores.
    gc.freeze()


def _exit_code(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"uf: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("uf: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output left (`uf ... | head`); a second failure at exit is kept from printing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        print("uf: ~NAME in a path: there is no such user; write the path out", file=sys.stderr)
        return 1
    except OSError as error:
        if error.strerror is None:
            raise  # a library's own use of the type: a traceback says more
        print(f"uf: {_named(error)}{error.strerror}", file=sys.stderr)
        return 1


def _named(error: OSError) -> str:
    """The file or files that the system refused, as the opening of a message."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: " if names else ""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(_overview() if len(arguments) < 2 else _command_help(_find(arguments[1]), arguments[1]))
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"unsloth-factory {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    command = _find(name)
    if "--help" in rest or "-h" in rest:
        print(_command_help(command, name))
        return 0
    parsed = parse(command.config_type, rest, command=name)
    for note in parsed.notes:
        print(f"note: {note}", file=sys.stderr)
    return command.load()(parsed.config)


def _find(name: str) -> Command:
    if name not in COMMANDS:
        raise UsageError(f"{name}: unknown command.{suggestion(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    return COMMANDS[name]


def _overview() -> str:
    lines = [f"unsloth-factory {__version__}: fine-tune, check and ship a language model on one small GPU", ""]
    lines += ["usage: uf COMMAND [settings.yaml] [--flag value ...]", ""]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "uf COMMAND --help lists its flags. `uf demo` shows everything in under three minutes."]
    return "\n".join(lines)


def _command_help(command: Command, name: str) -> str:
    lines = [f"usage: uf {name} [settings.yaml] [--flag value ...]", "", *_wrapped(command.config_type.__doc__ or "")]
    group = None
    for setting in settings_of(command.config_type).values():
        if setting.group != group:
            group = setting.group
            lines += ["", group]
        lines += _flag_help(setting)
    return "\n".join(lines)


def _flag_help(setting: Setting) -> list[str]:
    shown = setting.default is not None and setting.default is not False
    default = f" [{setting.default}]" if shown else ""
    target, _ = without_none(setting.annotation)
    choices = " | ".join(map(str, get_args(target))) if get_origin(target) is Literal else ""
    return [f"  --{setting.name} {choices}{default}".rstrip(), *_wrapped(setting.help, indent="        ")]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width=100, initial_indent=indent, subsequent_indent=indent)


if __name__ == "__main__":
    raise SystemExit(main())
