"""The ``sparse-engine`` command: one file per subcommand, no logic of their own."""
