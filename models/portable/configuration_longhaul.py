"""The config.json of a model of ours, as transformers reads it."""

from typing import Any

from transformers import PretrainedConfig


class LonghaulConfig(PretrainedConfig):
    """model, mixer: the sections of the configuration that the model was trained with.

    ops: keywords of `models.ops.select.Ops`, where its own choice for this machine will not do.
    """

    model_type = "longhaul"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        mixer: dict[str, Any] | None = None,
        ops: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model, self.mixer, self.ops = model or {}, mixer or {}, ops or {}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.model["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.model["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        return self.model["num_layers"]
