"""`tensafe sample`: text from a run, an artifact or a base model."""

from __future__ import annotations

import sys
from typing import Any

import click

from tensafe_client.cli.connecting import connect
from tensafe_client.cli.lazy import examples
from tensafe_client.cli.output import json_option, print_json, print_line
from tensafe_client.samples import SampleResult
from tensafe_client.token_streams import SampleStream


@examples(
    "tensafe sample --model smollm2-135m --chat 'What is the capital of France?'",
    "tensafe sample --artifact ARTIFACT --prompt 'Once upon a time' --temperature 0",
    "tensafe sample --model smollm2-135m --prompt 'Once upon a time' --stream",
    "tensafe sample --run RUN --step 100 --prompt 'def add(' --num-samples 4",
    "echo 'Once upon a time' | tensafe sample --model smollm2-135m --prompt -",
)
@click.command()
@click.option("--run", "run_id", metavar="RUN", help="Sample from this run's weights.")
@click.option("--artifact", "artifact_id", metavar="ARTIFACT", help="Sample from an artifact.")
@click.option("--model", "model_ref", metavar="MODEL", help="Sample from a base model.")
@click.option(
    "--step",
    type=click.IntRange(min=0),
    help="With --run: its weights as saved after this step. Without: its weights now.",
)
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; `-` reads stdin.")
@click.option("--chat", "chats", multiple=True, help="A user's message; `-` reads stdin.")
@click.option("--system", help="System message before every --chat.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token. [default: 1]"
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus. [default: 1]")
@click.option("--top-k", type=click.IntRange(min=0), help="The k likeliest; 0 for all.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Share of the likeliest's probability.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Fixes the draws: the same text again, where rounding is the same (deterministic runs).",
)
@click.option(
    "--stop",
    "stops",
    multiple=True,
    help="Text that ends a completion, beside the model's end token; repeatable.",
)
@click.option("--num-samples", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--top-logprobs",
    type=click.IntRange(1, 20),
    help="With --json: also the likeliest tokens at each place.",
)
@click.option(
    "--prompt-logprobs", is_flag=True, help="With --json: also of each token of the prompts."
)
@click.option(
    "--stream",
    is_flag=True,
    help="Print text as it is drawn; with --json a line for each piece, then one for the result.",
)
@json_option
@click.pass_context
def sample(
    ctx: click.Context,
    /,
    run_id: str | None,
    artifact_id: str | None,
    model_ref: str | None,
    step: int | None,
    prompts: tuple[str, ...],
    chats: tuple[str, ...],
    system: str | None,
    stops: tuple[str, ...],
    prompt_logprobs: bool,
    stream: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text.

    Name one of --run, --artifact and --model. --run without --step takes a place in the run's
    order, so leave it to the process that trains the run, or use --step with saved weights.

    Ctrl-C while it streams stops the sample.
    """
    if sum(source is not None for source in (run_id, artifact_id, model_ref)) != 1:
        raise click.UsageError("name exactly one of --run, --artifact and --model")
    if step is not None and run_id is None:
        raise click.UsageError("--step needs --run")
    inputs: list[Any] = [_text(prompt) for prompt in prompts]
    inputs += [_conversation(_text(chat), system) for chat in chats]
    if not inputs:
        raise click.UsageError("nothing to continue: give --prompt or --chat")
    if prompts and chats:
        raise click.UsageError("--prompt and --chat cannot be mixed in one call")
    if system is not None and not chats:
        raise click.UsageError("--system needs --chat")
    if not as_json and (options["top_logprobs"] or prompt_logprobs):
        raise click.UsageError("--top-logprobs and --prompt-logprobs are printed with --json only")
    if stream and not as_json and len(inputs) * options["num_samples"] > 1:
        raise click.UsageError("several texts at once are streamed with --json only")
    options = {name: value for name, value in options.items() if value is not None}
    options["prompt_logprobs"] = prompt_logprobs or None
    options["stream"] = stream
    if stops:
        options["stop"] = list(stops)
    client = connect(ctx)
    result: SampleResult | SampleStream
    if run_id is not None:
        if step is not None:
            options["step"] = step
        result = client.training_client(run_id).sample(inputs, **options)
    else:
        result = client.sample(inputs, artifact=artifact_id, model=model_ref, **options)
    if isinstance(result, SampleStream):
        _print_stream(result, as_json=as_json)
    elif as_json:
        print_json(result)
    else:
        _print(result)


def _print_stream(stream: SampleStream, *, as_json: bool) -> None:
    with stream:
        for chunk in stream:
            if as_json:
                print_line(chunk)
            else:
                click.echo(chunk.text, nl=False)
        if as_json:
            print_line(stream.result())
        else:
            click.echo()


def _text(value: str) -> str:
    return sys.stdin.read() if value == "-" else value


def _conversation(text: str, system: str | None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def _print(result: SampleResult) -> None:
    if len(result.samples) == 1:
        click.echo(result.samples[0].completion)
        return
    for number, one in enumerate(result.samples, 1):
        click.echo(
            f"--- {number} (prompt {one.prompt_index + 1}, {one.tokens_generated} tokens, "
            f"{one.finish_reason})"
        )
        click.echo(one.completion)
