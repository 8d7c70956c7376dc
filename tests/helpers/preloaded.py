"""What the server of `forked` imports and finds out once."""

from torch.utils import collect_env

import AutomaticEval.cli.app
import AutomaticEval.evaluation.evaluating
import AutomaticEval.models.loading
import AutomaticEval.store.export.formats  # noqa: F401

_KNOWN = collect_env.get_env_info()
collect_env.get_env_info = lambda: _KNOWN  # it asks pip, for longer than a short run takes
