"""How strong each head is: `R_h = E[‖z_h W_O^h‖]`, the mean L2 norm of its result over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from tqdm import tqdm

from AutomaticEval.analysis.numbers.moments import Moments
from AutomaticEval.analysis.numbers.text_groups import TextGroups, fingerprint_of
from AutomaticEval.analysis.parts.input_batches import Batcher
from AutomaticEval.analysis.result import Result
from AutomaticEval.capture.texts.forward import read
from AutomaticEval.errors import PromptError, SelectionError, StoreError, UnknownSite, UnsupportedModel, warn
from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.described.remembered import embedding_of
from AutomaticEval.models.head_weights import HeadResultNorms, n_inputs
from AutomaticEval.models.layout import Derived, Layout, Tap
from AutomaticEval.models.loading import load_model
from AutomaticEval.models.refused.unsuited import refuse_unready
from AutomaticEval.public_names import public_name
from AutomaticEval.sites import LayersLike, Site, expand, parse_heads, site_of
from AutomaticEval.store.disk.json_files import Stats, write_json
from AutomaticEval.store.reading.reduced_runs import refuse_reduced
from AutomaticEval.store.run import Run

CHUNK_ROWS = 65536
"""How many stored rows are read at once."""


class ActivationExtractor:
    """The strength of a model's heads over texts.

    model: a name, a folder, a loaded transformers model, or a LoadedModel. of: "result" measures z_h W_O^h, "z" the raw slice of z.
    Raises SelectionError for another `of`, ModelError for a model that cannot be loaded.

    >>> with ActivationExtractor("gpt2") as extractor:
    ...     extractor.extract_activations(["What is the capital of France?"])
    ...     extractor.compute_R_h()[(0, 3)]  # layer 0, head 3
    """

    def __init__(self, model: Any, model_name: str | None = None, *, tokenizer: Any = None, of: str = "result") -> None:
        if of not in ("result", "z"):
            raise SelectionError(f"of is {of!r}; write result or z.")
        loaded = _loaded(model, tokenizer)
        self.loaded = loaded
        self.model: Any = loaded.model
        self.tokenizer = tokenizer or loaded.tokenizer
        self.model_name = model_name or loaded.name
        self.of = of
        self.settings: Mapping[str, Any] | None = None
        """What `save_results` says of how the statistics were made, such as `AnalysisSettings.as_dict()`; None says nothing."""
        self.n_truncated = 0
        """How many texts were longer than the model's context and were cut to it."""
        self._layout: Layout | None = None
        self._heads: list[int] = []
        self._taps: dict[str, Tap] = {}
        self._moments: dict[int, Moments] = {}
        self.groups: TextGroups | None = None
        """Means over groups of the texts, and a fingerprint of all of them. None before heads are chosen."""

    def set_model_structure(
        self, output_projection: str, n_layers: int, n_heads: int, d_head: int, *, embedding: str | None = None
    ) -> None:
        """Name the parts of a model whose module tree is not recognised.

        output_projection: the path of attention's output projection, with {} for the layer, such as "decoder.blocks.{}.attn.out".
        embedding: the path of the module that is given the token ids; by default the model's own input embeddings.
        Raises UnsupportedModel for a path that is no projection of n_heads heads of d_head numbers.
        """
        if "{}" not in output_projection:
            raise UnsupportedModel(f"{output_projection!r} has no {{}} for the layer.")
        names = {id(module): name for name, module in self.model.named_modules()}
        taps, widths = {}, {}
        for layer in range(n_layers):
            path = output_projection.format(layer)
            try:
                module = self.model.get_submodule(path)
            except AttributeError:
                raise UnsupportedModel(f"{type(self.model).__name__} has no module {path}.") from None
            if getattr(module, "weight", None) is None or n_inputs(module) != n_heads * d_head:
                raise UnsupportedModel(f"{path} is no projection of {n_heads} heads of {d_head} numbers: {module}.")
            site, norms = Site("z", layer), HeadResultNorms(n_heads)
            taps[site] = Tap(path, "input")
            taps[Site("head_result_norm", layer)] = Tap(path, "input", then=norms)
            widths[site] = n_heads * d_head
        embedding = embedding or names[id(embedding_of(self.model))]
        self._layout = Layout(n_layers, 0, n_heads, n_heads, d_head, embedding, taps, widths)
        self.remove_hooks()

    @property
    def layout(self) -> Layout:
        """Where each site is in the model: found from its module tree, or as `set_model_structure` named it."""
        if self._layout is None:
            self._layout = LoadedModel(self.model, self.tokenizer, self.model_name).layout
        return self._layout

    def register_hooks(self, layers: LayersLike = None, heads: LayersLike = None) -> None:
        """Choose layers and heads (3, "0-2,-1", range(4), [0, 1]; None for all). Statistics of earlier texts are forgotten.

        The hooks themselves are on the model only while it runs.
        Raises UnknownLayer, SelectionError for a head that the model does not have, SiteUnavailable for a model without heads.
        """
        self.remove_hooks()
        layout = self.layout
        self._heads = parse_heads(heads, layout.n_heads)
        kind = "head_result_norm" if self.of == "result" else "z"
        asked = expand([kind], layers, layout.n_layers)
        sites = layout.where_held(asked) if layers is None else asked
        self._taps = layout.pick(sites)
        self._moments = {int(site.layer or 0): Moments(len(self._heads)) for site in sites}
        self.groups = TextGroups(len(self._heads), list(self._moments))

    def remove_hooks(self) -> None:
        """Forget the chosen layers and heads, and all statistics."""
        self._taps, self._moments, self.groups, self.n_truncated = {}, {}, None, 0

    def __enter__(self) -> ActivationExtractor:
        return self

    def __exit__(self, *failure: object) -> None:
        """Leave the statistics as they are; no hooks are on the model."""

    def extract_activations(
        self,
        data: Iterable[Any] | Path,
        tokenizer: Any = None,
        max_batches: int | None = None,
        *,
        batch_size: int = 8,
        progress: bool = False,
    ) -> None:
        """Run the model over texts, lists of token ids, or a data loader's batches, and add every real token to the statistics.

        Texts may also come as the Path of a file, a DataFrame, a generator, or objects with a field text, input, question or prompt.
        A loader's batch is a mapping with input_ids [batch, pos] and, when there is padding on either side, attention_mask.
        Neither padding nor the order of the data changes a number. max_batches: stop after this many batches.
        Raises PromptError for empty texts and for no data, ModelError for texts without a tokenizer.
        """
        refuse_unready(self.model)
        if not self._taps:
            self.register_hooks()
        n_before = sum(each.n for each in self._moments.values())
        batcher = Batcher(LoadedModel(self.model, tokenizer or self.tokenizer, self.model_name))
        batches = batcher.batches(data, batch_size, max_batches)
        for batch in tqdm(batches, disable=not progress, desc="Extracting", unit="batch"):
            values = read(self.model, self.layout, self._taps, batch).values()
            assert self.groups is not None, "heads are chosen"
            of_tokens = self.groups.add_texts([ids[mask].tolist() for ids, mask in zip(*batch, strict=True)])
            for (layer, moments), rows in zip(self._moments.items(), values, strict=True):
                norms = self._norms(rows)[:, self._heads]
                moments.add(norms)
                self.groups.add(layer, of_tokens, norms)
        self.n_truncated += batcher.n_truncated
        if sum(each.n for each in self._moments.values()) == n_before:
            raise PromptError("there were no texts to extract from.")
        if self.n_truncated:
            warn(f"{self.n_truncated} texts were longer than the context and were cut to it.")

    def _norms(self, rows: Tensor) -> Tensor:
        """[n, n_heads]. rows: the norms themselves, or z [n, n_heads * d_head], as `of` says."""
        if self.of == "result":
            return rows
        z = rows.float().reshape(len(rows), self.layout.n_heads, -1)
        return cast(Tensor, z.norm(dim=-1))

    def compute_R_h(self) -> dict[tuple[int, int], float]:
        """(layer, head) -> R_h, the mean norm over tokens. Raises PromptError before anything was extracted."""
        return {key: each["R_h"] for key, each in self.get_all_stats().items()}

    def get_all_stats(self) -> Stats:
        """(layer, head) -> a dict of R_h, std, min and max of the norm over tokens, and n, the number of tokens.

        Raises PromptError before anything was extracted.
        """
        if not any(each.n for each in self._moments.values()):
            raise PromptError("nothing was extracted yet; call extract_activations first.")
        return stats_of(self._moments, self._heads)

    def save_results(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the statistics as a JSON file. Raises PathExists, and PromptError before anything was extracted."""
        write_json(path, self.results(), overwrite=overwrite)

    def results(self) -> dict[str, Any]:
        """The statistics as a dict: what `save_results` writes."""
        return self.result().as_json()

    def result(self) -> Result:
        """The statistics as a result."""
        result = strength_result(self.get_all_stats(), self.model_name, self.of, self.groups)
        return replace(result, settings=self.settings)


def strength_result(stats: Stats, model: str, of: str, groups: TextGroups | None = None, **more: Any) -> Result:
    """Statistics as a result. of: "result" or "z". groups: of the texts. more: what else the file says, such as which tokens were counted."""
    heads: list[dict[str, Any]] = [
        {"layer": layer, "head": head, **numbers} for (layer, head), numbers in stats.items()
    ]
    if groups is not None:
        more["inputs"] = {
            "fingerprint": groups.fingerprint,
            "n_texts": groups.n_texts,
            "group_tokens": groups.n_tokens,
        }
        by_group = [column for layer in dict.fromkeys(layer for layer, _ in stats) for column in groups.means(layer).T]
        heads = [{**head, "by_group": column.tolist()} for head, column in zip(heads, by_group, strict=True)]
    return Result("strength", {"model": model, "of": of, **more, "heads": heads})


def stats_of(moments: Mapping[int, Moments], heads: Sequence[int]) -> Stats:
    """The statistics that `get_all_stats` gives. moments: layer -> one column for each of `heads`."""
    return {
        (layer, head): {
            "R_h": float(each.mean[column]),
            "std": float(each.std[column]),
            "min": float(each.low[column]),
            "max": float(each.high[column]),
            "n": each.n,
        }
        for layer, each in moments.items()
        for column, head in enumerate(heads)
    }


def strength_of_run(run: Run, model: Any = None) -> Stats:
    """The statistics that `get_all_stats` gives, over a stored run that kept `head_result_norm`, or `z`.

    model: the model that made the run; only a run that kept z needs it. Each stored row counts once, so a beginning that requests share
    counts once. Memory does not grow with the run. Raises StoreError when neither was kept, and for a model with other weights;
    SelectionError for reduced rows.
    """
    refuse_reduced(run.settings, "the strength of heads")
    layers = {site.layer: key for key in run.keys if (site := _site(key)) and site.kind == "head_result_norm"}
    norms_of_z: dict[int, Derived] = {}
    if not layers:
        layers = {site.layer: key for key in run.keys if (site := _site(key)) and site.kind == "z"}
        if not layers or model is None:
            raise StoreError(
                f"{run!r} has no head_result_norm; keep it (--sites head_result_norm), or keep z and pass the model. It has: "
                f"{', '.join(run.keys)}."
            )
        norms_of_z = _norms_of(run, model, [int(layer or 0) for layer in layers])
    moments = {}
    for layer, key in sorted(layers.items(), key=lambda item: item[0] or 0):
        rows = run.rows(key)
        each: Moments | None = None
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            norms = norms_of_z[int(layer or 0)](chunk) if norms_of_z else chunk.float()
            each = each or Moments(norms.shape[1])
            each.add(norms)
        if each is not None:
            moments[int(layer or 0)] = each
    n_heads = next(iter(moments.values())).width if moments else 0
    return stats_of(moments, range(n_heads))


def inputs_of_run(run: Run) -> dict[str, Any]:
    """What a file of strengths says of a run's inputs: a fingerprint of all prompts with their responses, in any order, and how many there are."""
    texts = [
        f"{prompt}\0{response}" for prompt, response in zip(run.column("prompt"), run.column("response"), strict=True)
    ]
    return {"fingerprint": fingerprint_of(texts), "n_texts": len(texts)}


def _loaded(model: Any, tokenizer: Any = None) -> LoadedModel:
    """The model of a name, a folder or an instance. An instance needs no tokenizer unless texts are read."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return load_model(model, tokenizer=tokenizer)
    return LoadedModel(model, tokenizer, public_name(str(getattr(model, "name_or_path", ""))))


def _site(key: str) -> Site | None:
    """The site of a key; None for a key that names none, as a file of somebody else may hold."""
    try:
        return site_of(key)
    except UnknownSite:
        return None


def _norms_of(run: Run, model: Any, layers: Sequence[int]) -> dict[int, Derived]:
    """Layer -> the function from z to norms. Raises StoreError for another model than the run's."""
    loaded = _loaded(model)
    now = loaded.identity()
    apart = run.made_with.differences(now, repr(run), now.names)
    if apart:
        raise StoreError(
            f"{run!r} was made by a model with other weights ({apart[0]}); pass the one that it was made with."
        )
    norms = {}
    for layer in layers:
        site = Site("head_result_norm", layer)
        tap = loaded.layout.pick([site])[site.key]
        assert tap.then is not None
        tap.then.refresh(loaded.model.get_submodule(tap.module))
        norms[layer] = tap.then
    return norms
