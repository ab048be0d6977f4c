"""The commands, one module each: `main(arguments, prog) -> exit code`."""
