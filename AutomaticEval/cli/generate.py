"""`main.py generate "…"`: one prompt, one response, and on request its activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from AutomaticEval.cli import options
from AutomaticEval.cli.options import one_line_errors, with_load
from AutomaticEval.cli.printing import say


@one_line_errors
@with_load
def generate(
    load: options.Load,
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: options.Model = "demo",
    save_path: Annotated[
        Path | None, typer.Option("--save_path", help="Capture, and write the activations to this HDF5 file.")
    ] = None,
    capture_activations: Annotated[
        bool, typer.Option("--capture_activations", help="Capture into a new file in --activation_save_dir.")
    ] = False,
    activation_save_dir: options.SaveDir = Path("activations"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --save_path.")] = False,
    layers: options.Layers = None,
    sites: options.Sites = None,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions", help="all (default; of logits: scored), prompt, response, scored, last, or a slice."
        ),
    ] = None,
    store_dtype: options.StoreDtype = None,
    strict: options.Strict = False,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="The most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top_p")] = 1.0,
    top_k: Annotated[int, typer.Option("--top_k", help="0: no limit.")] = 0,
    seed: options.Seed = None,
    system_prompt: Annotated[str | None, typer.Option("--system_prompt")] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no_chat_template", help="Do not use the model's chat template.")
    ] = False,
) -> None:
    """Answer one prompt; with --save_path or --capture_activations, keep its activations."""
    captures = capture_activations or save_path is not None
    how = "--save_path or --capture_activations"
    options.chosen(sites, layers, positions, store_dtype, "all", captures=captures, how=how)
    if not captures:
        options.refuse_unused(context, "nothing is captured", "strict")
    if save_path is None:
        options.refuse_unused(context, "no --save_path is, where a file could be replaced", "overwrite")
    if save_path is not None or not captures:
        options.refuse_unused(context, "no file is named by itself", "activation_save_dir")
    options.quiet_libraries()
    from AutomaticEval.capture.prompt import generate_inference, generate_inference_with_activations
    from AutomaticEval.store.disk.file_names import file_stem
    from AutomaticEval.store.disk.whole_files import size_text

    asked: dict[str, Any] = {
        "sites": sites,
        "positions": positions,
        "store_dtype": store_dtype,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "system_prompt": system_prompt,
        "apply_chat_template": not no_chat_template,
        "overwrite": overwrite,
        "strict": strict,
        **vars(load()),
    }
    if save_path is None and capture_activations:
        save_path = activation_save_dir / f"{file_stem('generation', prompt)}.h5"
    if save_path is None:
        say(generate_inference(prompt, model, **asked))
        return
    response, kept = generate_inference_with_activations(prompt, model, save_path, layers, **asked)
    say(response)
    file = Path(kept["path"])
    say(f"Activations: {file} ({size_text(file.stat().st_size)}, {len(kept['token_ids'])} positions)", err=True)
    say(f"Load them:   from AutomaticEval import load_activations; load_activations({str(file)!r})", err=True)
