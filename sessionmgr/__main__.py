"""``python -m sessionmgr``: the command line, or what to install for it."""

from __future__ import annotations

import sys

__all__ = ("main",)


def main() -> None:
    """Run the command line; without click and rich, say how to get them and exit with 2."""
    try:
        from .cli import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("click", "rich"):
            raise
        sys.stderr.write(
            f"Error: the command line needs {package}, which is not installed:"
            " pip install 'sessionmgr[cli]'\n"
        )
        sys.exit(2)
    cli(prog_name="sessionmgr")


if __name__ == "__main__":
    main()
