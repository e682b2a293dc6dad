"""Runs the command line as `python -m tensafe_client.cli`."""

from tensafe_client.cli.main import main

main(prog_name="tensafe")
