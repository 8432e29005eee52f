"""The two ways in which a command ends badly: the user can mend it, or the command line was wrong."""


class UserError(ValueError):
    """Something the user can mend. The message names the file, row, field or flag, the limit and the next step.

    The command line prints it without a traceback and exits with `exit_code` (1: the work failed).
    """

    exit_code = 1


class UsageError(UserError):
    """The command line or a settings file is wrong; nothing was started (exit code 2)."""

    exit_code = 2


class Stopped(UserError):
    """A signal stopped the work after its state was saved; exit code 128 + signal number (130 or 143)."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def require(condition: bool, flag: str, value: object, rule: str) -> None:
    """Refuse a setting: UsageError with its flag, its value and the rule."""
    if not condition:
        raise UsageError(f"--{flag} {value}: {rule}")


def require_at_least(least: int, settings: object, *flags: str) -> None:
    """Refuse settings below a number; None is a setting that was not given."""
    for flag in flags:
        value = getattr(settings, flag)
        require(value is None or value >= least, flag, value, f"at least {least}")
