"""Runs the command line as `python -m tensafe_client.cli`."""

from tensafe_client.cli.entry import main

main(prog_name="tensafe")
