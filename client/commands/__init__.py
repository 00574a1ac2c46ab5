"""One file a command: a function named `command` that `client.cli` registers under the file's name."""
