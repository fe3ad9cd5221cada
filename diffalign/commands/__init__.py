"""The subcommands of ``diffalign``: one file a command, and its configuration beside it."""
