"""The arguments of each command, parsed and checked."""
