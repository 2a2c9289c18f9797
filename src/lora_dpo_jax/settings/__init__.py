"""From files and command lines to the config of a command."""
