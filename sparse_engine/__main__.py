"""The command ``sparse-engine``, and ``python -m sparse_engine``."""

import sys

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported is no traceback either."""
    try:
        from sparse_engine.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
