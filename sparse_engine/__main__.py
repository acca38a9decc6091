"""The command ``sparse-engine``, and ``python -m sparse_engine``."""

import sys

from sparse_engine.errors import EXIT_INTERRUPTED


def main() -> None:
    """Run the command line; a signal while it is still being imported is no traceback either."""
    try:
        from sparse_engine import process

        process.begin()
        from sparse_engine.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
