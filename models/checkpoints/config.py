"""Model configs as plain dicts, `model:` and `mixer:` as in conf/, read for a published format."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args, get_origin

from models.hybrid import HybridLM
from models.mixer import Mixer

Config = dict[str, Any]

# Our keyword -> field of config.json, in every family of the Llama line.
MODEL_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
TOKEN_FIELDS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


def target(mixer: type[Mixer]) -> str:
    """The class as a config names it."""
    return f"{mixer.__module__}.{mixer.__qualname__}"


def defaults(constructor: Callable[..., object]) -> Config:
    """What its keywords are where a config does not have them."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def layer_mixers(model: Config) -> list[str]:
    """The mixer's name for every layer."""
    pattern = model["pattern"]
    return [pattern[i % len(pattern)] for i in range(model["num_layers"])]


def shortest_pattern(layers: list[str]) -> list[str]:
    """The shortest pattern that, repeated over the layers, gives them."""
    for period in range(1, len(layers)):
        if all(layer == layers[i % period] for i, layer in enumerate(layers)):
            return layers[:period]
    return layers


def settings_of(section: Config, mixer: type[Mixer]) -> Config:
    """All keywords of a mixer of this class: those its section gives, and the defaults."""
    return defaults(mixer) | {k: v for k, v in section.items() if not k.startswith("_")}


def shared_keywords(
    config: Config, mixer: type[Mixer], *, held: Collection[str], fixed: Config
) -> tuple[set[str], Config]:
    """The names that the layers use for mixers of this class, and the keywords these share.

    held: the keywords for which config.json has a field. Raises ValueError where two mixers differ,
    or any other keyword has not its one value: the `fixed` one, else the mixer's default.
    """
    used = dict.fromkeys(layer_mixers(config["model"]))
    names = [name for name in used if config["mixer"][name]["_target_"] == target(mixer)]
    only = {k: x for k, x in (defaults(mixer) | fixed).items() if k not in held}
    shared: Config = {}
    for name in names:
        settings = settings_of(config["mixer"][name], mixer)
        for keyword, allowed in only.items():
            if settings[keyword] != allowed:
                raise ValueError(
                    f"mixer.{name}.{keyword} is {settings[keyword]}; "
                    f"this model family has only {allowed}"
                )
        if shared and settings != shared:
            raise ValueError(
                f"mixer.{names[0]} and mixer.{name} differ; this model family has one size of each"
            )
        shared = settings
    return set(names), shared


def check_model(model: Config, fixed: Config, *, family: str) -> None:
    """Raises ValueError for a keyword of `model` that has another than its one value, and unless
    all layers have a feed-forward where `fixed` does not say so."""
    if model["ffn"] is None and "ffn" not in fixed:
        raise ValueError(f"model.ffn is null; {family} has a feed-forward in every layer")
    for keyword, allowed in fixed.items():
        if model[keyword] != allowed:
            raise ValueError(f"model.{keyword} is {model[keyword]}; {family} has only {allowed}")


def check_fields(hf: Config, fixed: Config) -> None:
    """Raises ValueError for a field of config.json that is there with another than its value."""
    for name, allowed in fixed.items():
        if hf.get(name, allowed) != allowed:
            raise ValueError(f"config.json: {name} is {hf[name]!r}; it must be {allowed!r}")


def field(config: Config, name: str, kind: Any = int) -> Any:
    """A field of config.json, or of a section in it; kind: a type, a list of one, or a union.

    Raises ValueError where it is missing or of another kind; a whole number is a float, too.
    """
    if name not in config:
        raise ValueError(f"config.json: {name} is missing")
    if not _is(config[name], kind):
        allowed = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"config.json: {name} is {config[name]!r}; allowed: {allowed}")
    return config[name]


def size(config: Config, name: str) -> int:
    """`field`, where 0 makes no model."""
    value: int = field(config, name)
    if value < 1:
        raise ValueError(f"config.json: {name} is {value}; allowed: 1 or more")
    return value


def optional(config: Config, name: str, kind: Any = int, default: Any = None) -> Any:
    """`field`, or the default where there is none, or null."""
    return default if config.get(name) is None else field(config, name, kind)


def keywords(
    config: Config, fields: Mapping[str, str], constructor: Callable[..., object]
) -> Config:
    """Of a constructor, those for which there are fields, of the types that it wants."""
    parameters = inspect.signature(constructor).parameters
    return {
        ours: field(config, theirs, parameters[ours].annotation) for ours, theirs in fields.items()
    }


def model_keywords(config: Config, fields: Mapping[str, str] = MODEL_FIELDS) -> Config:
    """Those of HybridLM, whose integers are sizes."""
    for ours in ("vocab_size", "d_model", "num_layers"):
        size(config, fields[ours])
    return keywords(config, fields, HybridLM)


def _is(value: object, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, *get_args(kind)) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
