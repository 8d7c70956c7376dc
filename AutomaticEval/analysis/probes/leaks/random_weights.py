"""What the same architecture tells with random weights: a baseline, and a sign that a label is in the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from AutomaticEval.analysis.probes.grid.spots import Spot
from AutomaticEval.analysis.probes.judged import Judge
from AutomaticEval.analysis.probes.out_of_fold import OutOfFold, best_of, out_of_fold
from AutomaticEval.analysis.probes.places import at_each
from AutomaticEval.analysis.probes.target import Target
from AutomaticEval.capture.recompute.plain_forward import pattern_layer, refuse_lacking
from AutomaticEval.capture.recompute.recomputed_run import loaded_as
from AutomaticEval.capture.recompute.rows_on_disk import rows_on_disk
from AutomaticEval.errors import OtherSettings, SelectionError
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.random_weights import random_model
from AutomaticEval.models.described.remembered import embedding_of
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run


def ready_random_model(run: Run, sites: Sequence[str], seed: int) -> LoadedModel:
    """A model of the run's configuration, in its dtype, with random weights.

    Raises SelectionError for a run whose rows were reduced, for attention patterns, and for token ids that the model does not have; OtherSettings where the run's model
    is now of another shape; as `random_model`.
    """
    refuse_reduced(run.settings, "the baseline of random weights")
    patterns = [key for key in sites if pattern_layer(key) is not None]
    if patterns:
        raise SelectionError(
            f"{patterns[0]}: attention patterns have no baseline of random weights; name other sites (keys=, --sites), or leave random_model out."
        )
    name, options = loaded_as(run)
    made = random_model(str(name), options, seed)
    shape = run.settings.get("shape")
    if shape is not None and dict(shape) != made.shape:
        raise OtherSettings(
            f"{run.path} was made with a model of another shape than {name} has now: {dict(shape)}, and now {made.shape}. Without that model there is no baseline of "
            "random weights; leave random_model out."
        )
    refuse_lacking(made, sites)
    return made


def with_random_weights(
    loaded: LoadedModel, of: Target, judge: Judge, spots: Sequence[Spot], advance: Callable[[int], None]
) -> OutOfFold:
    """What probes of the model's rows say, at the place that is best inside each fold's training part. advance: is told of each question, and of each place."""
    questions, contents = of.questions, of.questions.source.contents
    positions, sites = list(dict.fromkeys(spot.position for spot in spots)), list(dict.fromkeys(s.site for s in spots))
    rows = [questions.row_numbers(each) for each in positions]
    places = np.stack([np.asarray(contents.positions[each]) for each in rows], 1)  # [n_questions, n_positions]
    samples, n_known = questions.first_samples.tolist(), embedding_of(loaded.model).weight.shape[0]

    def sequence(number: int) -> np.ndarray:
        ids = np.concatenate([each.item(samples[number]) for each in (contents.input_ids, contents.generated_ids)])
        if ids.max() >= n_known:
            raise SelectionError(
                f"{questions.source.path} has the token {ids.max()}, and {loaded.name} has {n_known} tokens: an adapter may have added some. Leave random_model out."
            )
        return ids

    with rows_on_disk(loaded, sequence, places, sites, advance) as stored:

        def one(spot: Spot) -> OutOfFold:
            read = stored.read(spot.site, positions.index(spot.position)).float().numpy()
            if not np.isfinite(read).all():
                raise SelectionError(
                    f"{loaded.name} has numbers that are infinite or NaN at {spot.name}; leave random_model out, or probe a run in a wider dtype."
                )
            found = out_of_fold(lambda _: read, of.labels, judge.repeats)
            advance(1)
            return found

        found, _ = best_of(at_each(spots, one), judge.repeats)
    return found
