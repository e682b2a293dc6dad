"""`tensafe train`: fine-tuning from the command line, one file for each kind."""

from __future__ import annotations

import click

from tensafe_client.cli.train.private import private
from tensafe_client.cli.train.rlvr import rlvr
from tensafe_client.cli.train.sft import sft


@click.group()
def train() -> None:
    """Fine-tune a model."""


train.add_command(sft)
train.add_command(rlvr)
train.add_command(private)
