"""The config of a model with what a person has said in its place."""

from __future__ import annotations

from typing import Any

from AutomaticEval.errors import UnsupportedModel
from AutomaticEval.models.architecture.description import NUMBERS, Description


def text_config(model: Any) -> Any:
    """The config of a model's text part; None for a plain module without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def numbers_of(model: Any, names: Description) -> tuple[Any, ...]:
    """What a model's layout depends on besides its modules: its dtype, the numbers of its config, and those that its modules hold under known names.

    Two that are equal give the same layout. Ids of tokens are left out, because libraries set them while they run.
    """
    config = text_config(model)
    entries = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    of_config = [
        (name, value) for name, value in entries.items() if _is_number(value) and not name.endswith("_token_id")
    ]
    held = ("top_k", *names.scale, *names.attention_scale, *names.mixer_scale)
    of_modules = [vars(module).get(name) for module in model.modules() for name in held]
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    return dtype, tuple(sorted(of_config)), tuple(each for each in of_modules if _is_number(each))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class GivenConfig:
    """A config whose numbers are those of a description, where it gives them. Everything else is that of the config.

    Raises UnsupportedModel for a name that the config does not have.
    """

    def __init__(self, config: Any, description: Description) -> None:
        self._config = config
        self._given = {
            NUMBERS[name]: _read(config, name, value) if isinstance(value, str) else value
            for name, value in description.numbers
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_given"):
            raise AttributeError(name)
        if name in self._given:
            return self._given[name]
        config = self._config
        if isinstance(config, dict) and name in config:
            return config[name]
        return getattr(config, name)


def _read(config: Any, name: str, own_name: str) -> Any:
    value = config.get(own_name) if isinstance(config, dict) else getattr(config, own_name, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = "the model has no config" if config is None else f"the config says {value!r} there"
        raise UnsupportedModel(f"{name} is described as the config's {own_name!r}, and {found}; give a number.")
    return value
