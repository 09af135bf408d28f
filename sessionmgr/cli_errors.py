"""How commands end that cannot do their job: one line on standard error, and a status."""

from __future__ import annotations

import signal

import click

__all__ = ("StoppedError", "UnusableError")


class UnusableError(click.ClickException):
    """Ends the command: what it was given cannot be used."""

    exit_code = 2


class StoppedError(click.ClickException):
    """Ends the command after Ctrl-C."""

    exit_code = 128 + signal.SIGINT
