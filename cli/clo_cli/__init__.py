"""The `clo` command, a file for each subcommand. Nothing imports it."""
