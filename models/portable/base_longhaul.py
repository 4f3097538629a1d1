"""Models of ours as transformers knows models: loaded by name, trained with labels, generating."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import CausalLMOutputWithPast

from models.mixer import Cache, Mixer
from models.ops.select import Ops
from models.portable.build import build
from models.portable.configuration_longhaul import LonghaulConfig
from models.precision import Island
from models.sequence import Fragment, SequenceInfo

# How the installed transformers calls what a model remembers.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class LonghaulCache:
    """What the layers remember of one document a row, all of one length."""

    is_linear = (True,)  # no token is taken back
    is_compileable = False

    def __init__(self, layers: int) -> None:
        self.layers: list[Cache] = [{} for _ in range(layers)]
        self.seen = 0

    def get_seq_length(self) -> int:
        return self.seen

    def reorder_cache(self, beams: Tensor) -> None:
        for layer in self.layers:
            layer.update({name: x.index_select(0, beams) for name, x in layer.items()})


class LonghaulModel(PreTrainedModel, GenerationMixin):
    """`classes`: the mixers by name; a folder has a subclass that fills it in."""

    config_class = LonghaulConfig
    base_model_prefix = "model"
    classes: ClassVar[Mapping[str, type[Mixer]]] = {}
    _is_stateful = True  # a recurrent state does not go back

    def __init__(self, config: LonghaulConfig) -> None:
        super().__init__(config)
        here = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        ops = Ops(**here | {"dtype": torch.get_default_dtype()} | config.ops)
        self.model = build(config.model, config.mixer, classes=self.classes, ops=ops)
        self._no_split_modules = ["Layer"]
        self._keep_in_fp32_modules_strict = {
            name for name, module in self.named_modules() if isinstance(module, Island)
        }
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """What no file has: all of a new model, and the counters of a loaded one."""
        own = list(module.parameters(recurse=False))
        if own and not any(getattr(x, "_is_hf_initialized", False) for x in own):
            self.model.reset_module(module)
        for name in module._non_persistent_buffers_set:
            module.get_buffer(name).zero_()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: LonghaulCache | None = None,
        cache: LonghaulCache | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids: [batch, seq], one document a row; attention_mask: [batch, seen + seq], zeros
        for padding before or behind it, which only a pass without a cache may have.

        labels: [batch, seq], as input_ids; -100 is not scored. logits_to_keep: of so many last
        tokens; 0: of all.
        """
        cache = cache or past_key_values
        if use_cache and cache is None:
            cache = LonghaulCache(len(self.model.layers))
        info = _info(input_ids, attention_mask, cache)
        hidden = self.model(input_ids, info, None if cache is None else cache.layers)
        if cache is not None:
            cache.seen += input_ids.shape[1]
        logits = F.linear(hidden[:, -logits_to_keep:], self.model.head_weight)
        loss = None
        if labels is not None:
            scores, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(scores.float(), targets, ignore_index=-100)
        remembered: dict[str, Any] = {CACHE: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **remembered)
        return output if return_dict is not False else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get(CACHE)
        kept = {key: kwargs.get(key) for key in ("attention_mask", "use_cache", "logits_to_keep")}
        if cache is not None:
            input_ids = input_ids[:, cache.seen :]
        given = {key: value for key, value in kept.items() if value is not None}
        return {"input_ids": input_ids, "cache": cache, **given}


def _info(tokens: Tensor, mask: Tensor | None, cache: LonghaulCache | None) -> SequenceInfo:
    """Raises ValueError for a mask that is no document between padding, or padding in a cache."""
    batch, length = tokens.shape
    seen = 0 if cache is None else cache.seen
    if mask is None or bool(mask.all()):
        return SequenceInfo.span(batch, seen, seen + length, tokens.device)
    if cache is not None:
        raise ValueError(
            "attention_mask has zeros: a cache holds prompts of one length; allowed: "
            "use_cache=False, or one prompt at a time"
        )
    return SequenceInfo.from_fragments([_row(row) for row in mask.tolist()], tokens.device)


def _row(mask: list[int]) -> list[Fragment]:
    first, valid = mask.index(1) if 1 in mask else len(mask), sum(map(bool, mask))
    if not all(mask[first : first + valid]):
        raise ValueError("attention_mask has zeros between ones; allowed: before or behind them")
    behind = len(mask) - first - valid
    fragments = [
        Fragment(first, 0, padding=True),
        Fragment(valid, first),
        Fragment(behind, first + valid, padding=True),
    ]
    return [fragment for fragment in fragments if fragment.length]
