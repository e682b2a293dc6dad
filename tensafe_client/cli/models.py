"""`tensafe models`: the registered base models."""

from __future__ import annotations

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_fields, print_json, print_table


@click.group()
def models() -> None:
    """List and show base models."""


@examples("tensafe models list")
@models.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """List the models that the operator has registered."""
    found = connect(ctx).models()
    if as_json:
        print_json(found)
        return
    print_table(
        ("MODEL", "ARCHITECTURE", "PARAMETERS", "CONTEXT", "DTYPE", "CHAT"),
        [
            (
                model.name,
                model.architecture,
                f"{model.parameters / 1e6:.1f} M",
                model.context_length or "any",
                model.dtype,
                "yes" if model.has_chat_template else "no",
            )
            for model in found
        ],
    )


@examples("tensafe models show smollm2-135m")
@models.command()
@click.argument("model_ref", metavar="MODEL")
@json_option
@click.pass_context
def show(ctx: click.Context, model_ref: str, as_json: bool) -> None:
    """Show MODEL, and the modules that LoRA can adapt in it."""
    model = connect(ctx).model(model_ref)
    if as_json:
        print_json(model)
        return
    modules = [f"{name} ({count})" for name, count in model.linear_modules.items()]
    print_fields(
        [
            ("model", model.name),
            ("also called", list(model.references) or None),
            ("architecture", model.architecture),
            ("parameters", f"{model.parameters:,}"),
            ("vocabulary", model.vocabulary_size or "any"),
            ("context", model.context_length or "any"),
            ("dtype", model.dtype),
            ("chat template", "yes" if model.has_chat_template else "no"),
            ("target modules", modules or "any"),
        ]
    )


@examples("tensafe models losses", "tensafe models losses smollm2-135m --json")
@models.command()
@click.argument("model_ref", metavar="[MODEL]", required=False)
@json_option
@click.pass_context
def losses(ctx: click.Context, model_ref: str | None, as_json: bool) -> None:
    """List what may be minimised, on MODEL or on all models, and what each loss takes."""
    found = connect(ctx).losses(model_ref)
    if as_json:
        print_json(found)
        return
    print_table(
        ("LOSS", "INPUTS", "OPTIONS", "REDUCTIONS", "FROM"),
        [
            (
                loss.name,
                " ".join(f"{i.name}{'' if i.required else '?'}" for i in loss.inputs),
                " ".join(
                    f"{option.name}" + ("" if option.default is None else f"={option.default}")
                    for option in loss.options
                )
                or "none",
                " ".join(loss.reductions),
                "the operator" if loss.plug_in else "built in",
            )
            for loss in found
        ],
    )
