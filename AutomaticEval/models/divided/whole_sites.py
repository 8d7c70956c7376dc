"""Which sites of a model that is divided among processes are whole in each of them."""

from __future__ import annotations

from dataclasses import replace

from AutomaticEval.models.architecture.module_names import Parts
from AutomaticEval.models.architecture.projections import Z
from AutomaticEval.models.divided.division import n_processes
from AutomaticEval.models.weights.fingerprint import hash_of_tensor
from AutomaticEval.processes import join_ranks
from AutomaticEval.sites import Site


def refuse_parts(parts: Parts) -> None:
    """Leave the sites out of which each of several processes has a part: those whose values differ among the processes, and all that are found in
    attention and MLP."""
    n = n_processes(parts.model)
    if n == 1:
        return
    own = {site: hash_of_tensor(parts.value(replace(tap, then=None))) for site, tap in parts.taps.items()}
    by_process = join_ranks().gathered(own)
    reason = f"the model is divided among {n} processes (tensor parallel), and each has a part of it"
    within = [Site(kind, layer) for kind in (*Z, *"qkv", "mlp_post") for layer, ran in enumerate(parts.ran) if ran]
    differing = [site for site in own if any(each.get(site) != own[site] for each in by_process)]
    for site in (*within, *differing):
        parts.taps.pop(site, None)
        parts.n_heads.pop(site, None)
        parts.missing[site] = reason
