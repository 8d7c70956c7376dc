"""What a saved probe says of one prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

from AutomaticEval.analysis.probes.saved.saved_probe import SavedProbe
from AutomaticEval.analysis.probes.saved.scores import check_model
from AutomaticEval.capture.prompt import generate_inference_with_activations
from AutomaticEval.errors import SelectionError
from AutomaticEval.settings import MODEL
from AutomaticEval.sites import site_of
from AutomaticEval.store.questions.questions import AT
from AutomaticEval.store.questions.response_tokens import is_in_prompt, is_in_response


class PromptScore(NamedTuple):
    """What a probe says of a prompt."""

    probability: float
    token: str
    """The token whose row was read."""


def prompt_score(probe: SavedProbe, prompt: str, model: Any, **load: Any) -> PromptScore:
    """The probability that a prompt is of the probe's class, by its row in one forward.

    model, load: as for `generate_inference_with_activations`. Raises SelectionError for a probe of a token that is not, or not for sure, in the prompt, for a prompt
    that is too short to have the token, and for a model whose rows have another width; as that function. Warns of another model.
    """
    if is_in_response(probe.position):
        raise SelectionError(
            f"the probe reads {probe.position}, a token of the response, and a prompt has none; score a run of generated answers."
        )
    if not is_in_prompt(probe.position):
        raise SelectionError(
            f"the probe reads {probe.position}, which may have been a token of the response; keep a probe of a token of the prompt, such as {AT}, or score a run."
        )
    site = site_of(probe.site)
    _, kept = generate_inference_with_activations(
        prompt,
        model,
        None,
        site.layer,
        sites=site.kind,
        positions=probe.position,
        max_new_tokens=1,
        apply_chat_template=probe.chat_template,
        **load,
    )
    (rows,) = kept["activations"].values()
    if len(rows) != 1:
        raise SelectionError(
            f"the prompt has {kept['input_ids'].shape[-1]} tokens, and the probe reads {probe.position}; write the prompt as the probe's run has it."
        )
    if rows.shape[-1] != probe.width:
        raise SelectionError(
            f"{probe.site} of {model} has {rows.shape[-1]} numbers, and the probe learned from rows of {probe.width} ({probe.model}); name that model (--model)."
        )
    check_model(probe, str(model), kept["settings"].get(MODEL))
    return PromptScore(float(probe.probabilities(rows)[0]), kept["tokens"][0])
