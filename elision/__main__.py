"""The command `elision` and `python -m elision`."""

from __future__ import annotations


def main() -> None:
    from .runtime.cli import main as run

    run()


if __name__ == "__main__":
    main()
