"""Where the selected sites are read, with what a selection keeps of each row: on the model's device, before rows are copied from it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.layout import Derived, Layout, Tap
from AutomaticEval.reducing.table import RowReduction, SampleReduction
from AutomaticEval.selection import Selection
from AutomaticEval.sites import TABLE, Site


@dataclass(eq=False)
class _Reduced:
    """Turns the rows of a site [..., width] into reduced rows [..., k], float32."""

    reduction: RowReduction
    matrix: Tensor | None
    of_matrix: tuple[str, str] | None
    """The hash of the projection and the key of the site, which tell the matrix apart."""
    before: Derived | None
    """What is computed of the module's value to have the site's own rows; None for a site that is the value."""

    _matrices: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def mark(self) -> Hashable:
        """That of the reduction, the matrix, and what is computed before."""
        return self.reduction, self.of_matrix, None if self.before is None else self.before.mark

    def refresh(self, module: nn.Module) -> None:
        """Call this before a forward. The matrix is then where the module is, so that no forward waits for it."""
        if self.before is not None:
            self.before.refresh(module)
        for device in {each.device for each in module.parameters() if not each.is_meta}:
            self._matrix_on(device)

    def __call__(self, value: Tensor) -> Tensor:
        rows = value if self.before is None else self.before(value)
        return self.reduction.reduced(rows, self._matrix_on(rows.device))

    def _matrix_on(self, device: torch.device) -> Tensor | None:
        if self.matrix is not None and device not in self._matrices:
            self._matrices[device] = self.matrix.to(device)
        return self._matrices.get(device)


def sites_of(layout: Layout, selection: Selection) -> list[Site]:
    """The sites that a selection keeps of a model, in the order of a forward.

    A kind that is asked for without layers is kept in the layers that have it, and a warning names them. Raises UnknownLayer.
    """
    sites = selection.sites(layout.n_layers)
    if selection.layers is not None:
        return list(sites)
    kept = {*layout.where_held(site for site in sites if site not in selection.single_sites), *selection.single_sites}
    return [site for site in sites if site in kept]


def taps_of(layout: Layout, selection: Selection) -> dict[str, Tap]:
    """The taps of the selected sites: key -> tap, which gives reduced rows where the selection reduces them.

    Raises UnknownLayer, SiteUnavailable, and SelectionError for a projection that does not fit a site.
    """
    sites = sites_of(layout, selection)
    taps = layout.pick(sites)
    reduction = selection.reduction
    if not isinstance(reduction, RowReduction):
        return taps
    matrices = {site.key: _matrix(selection, site.key, layout.widths[site]) for site in sites}
    project = selection.project
    of_matrix = {key: None if project is None else (project.sha256, key) for key in taps}
    return {
        key: replace(tap, then=_Reduced(reduction, matrices[key], of_matrix[key], tap.then))
        for key, tap in taps.items()
    }


def _matrix(selection: Selection, key: str, width: int) -> Tensor | None:
    return None if selection.project is None else selection.project.matrix(key, width)


def bytes_per_row(loaded: LoadedModel, selection: Selection) -> int:
    """Size of what is kept of one position, or with one line a sample of one sample, over all selected sites.

    Raises UnknownLayer, SiteUnavailable, SelectionError.
    """
    layout, reduction = loaded.layout, selection.reduction
    sites = sites_of(layout, selection)
    taps_of(layout, selection)  # raises for sites that cannot be kept
    n_bytes = 0
    for site in sites:
        width = layout.widths[site]
        kind = TABLE[site.kind]
        name = selection.store_dtype or ("float32" if reduction is not None else kind.dtype)
        name = kind.dtype if kind.holds_ids else name
        dtype = loaded.model.dtype if name is None else getattr(torch, name)
        if isinstance(reduction, RowReduction):
            width = reduction.width(_matrix(selection, site.key, width))
        n_bytes += width * int(dtype.itemsize)
    return n_bytes


def n_kept(selection: Selection, n_positions: int, n_samples: int = 1) -> int:
    """How many rows, or lines of samples, are stored of samples with so many kept positions."""
    return n_samples if isinstance(selection.reduction, SampleReduction) else n_positions
