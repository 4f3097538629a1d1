"""HybridLM: a language model whose layers take their token mixer from a pattern.

embed > [norm, mixer, norm, feed-forward] x num_layers > norm; a model may do without feed-forwards.
The head is `head_weight`, applied by whoever needs logits: a loss in tiles, generation to the last
token alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.checks import positive
from models.ffn import FeedForward
from models.load import BalancedRouter
from models.mixer import Cache, Mixer
from models.norm import RMSNorm
from models.ops.select import Ops
from models.residual import AttentionResidual, Residual, Stream, SumResidual
from models.rope import Rope
from models.sequence import SequenceInfo


class Layer(nn.Module):
    """One mixer and one feed-forward sub-layer, or none: the unit of checkpointing, compiling,
    sharding. residuals: one per sub-layer."""

    def __init__(
        self,
        d_model: int,
        *,
        mixer: Mixer,
        ffn: FeedForward | None,
        residuals: Sequence[Residual],
        norm_eps: float,
    ) -> None:
        super().__init__()
        if ffn is None:
            (self.mixer_residual,) = residuals
        else:
            self.mixer_residual, self.ffn_residual = residuals
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer
        if ffn is not None:
            self.ffn_norm = RMSNorm(d_model, eps=norm_eps)
        self.ffn = ffn

    def forward(self, stream: Stream, info: SequenceInfo, cache: Cache | None = None) -> Stream:
        x = self.mixer_norm(self.mixer_residual(stream))
        stream = self.mixer_residual.write(stream, self.mixer(x, info, cache))
        if self.ffn is None:
            return stream
        x = self.ffn_norm(self.ffn_residual(stream))
        return self.ffn_residual.write(stream, self.ffn(x, info))


class HybridLM(nn.Module):
    """tokens [batch, seq] -> hidden [batch, seq, d_model] behind the final norm.

    Layer i takes mixers[pattern[i % len(pattern)]], and the dense ffn where i < dense_layers or
    moe is None, else the mixture. mixers take (d_model, ops=), ffn (d_model), moe (d_model, ops=).
    ffn None: no layer has a feed-forward, as in Mamba-2; then moe is None too.
    residual_block: sub-layers per block of Block Attention Residuals; None for a plain sum.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Callable[..., Mixer]],
        ffn: Callable[..., FeedForward] | None,
        ops: Ops,
        moe: Callable[..., FeedForward] | None = None,
        dense_layers: int = 0,
        tie_embeddings: bool = False,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        residual_block: int | None = None,
    ) -> None:
        super().__init__()
        positive(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
        positive(residual_block=residual_block)
        if init_std < 0:
            raise ValueError(f"init_std is {init_std}; it must be at least 0")
        if ffn is None and moe is not None:
            raise ValueError(
                "ffn is null and moe is not; layers without a feed-forward have neither"
            )
        _check_pattern(pattern, mixers)
        self.pattern = [pattern[i % len(pattern)] for i in range(num_layers)]
        self.init_std = init_std

        def residual(sublayer: int) -> Residual:
            if residual_block is None:
                return SumResidual()
            opens = sublayer % residual_block == 0
            return AttentionResidual(d_model, opens_block=opens, norm_eps=norm_eps)

        def feed_forward(layer: int) -> FeedForward | None:
            if ffn is None or moe is None or layer < dense_layers:
                return None if ffn is None else ffn(d_model)
            return moe(d_model, ops=ops)

        sublayers = 1 if ffn is None else 2
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Layer(
                d_model,
                mixer=mixers[name](d_model, ops=ops),
                ffn=feed_forward(i),
                residuals=[residual(sublayers * i + j) for j in range(sublayers)],
                norm_eps=norm_eps,
            )
            for i, name in enumerate(self.pattern)
        )
        for i, layer in enumerate(self._layers):
            layer.mixer.place = i, num_layers
        self.residual = residual(sublayers * num_layers)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, info: SequenceInfo, caches: list[Cache] | None = None
    ) -> Tensor:
        """With caches, one per layer, `info` goes on where the cached tokens ended."""
        stream: Stream = (self.embed(tokens),)
        for i, layer in enumerate(self.layers):
            stream = layer(stream, info, None if caches is None else caches[i])
        return self.norm(self.residual(stream))

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, d_model]."""
        return self.embed.weight if self.head is None else self.head.weight

    def units(self) -> list[nn.Module]:
        """Sub-modules that make up the model, each layer one of them: what can be given memory,
        initial values and an owner without the rest."""
        parts = (self.embed, *self.layers, self.residual, self.norm, self.head)
        return [part for part in parts if part is not None]

    def reset_parameters(self) -> None:
        """Draws from torch's default generators, in the order of the modules."""
        for unit in self.units():
            self.reset_unit(unit)

    @torch.no_grad()
    def reset_unit(self, unit: nn.Module) -> None:
        for module in unit.modules():
            self.reset_module(module)

    @torch.no_grad()
    def reset_module(self, module: nn.Module) -> None:
        """Its own parameters: linears and embeddings N(0, init_std), biases 0, norms 1; others by
        their owner."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif next(module.parameters(recurse=False), None) is not None:
            cast(Any, module).reset_parameters(self.init_std)

    def routers(self) -> list[BalancedRouter]:
        return [module for module in self.modules() if isinstance(module, BalancedRouter)]

    def set_rope(self, *, base: float | None = None, factor: float | None = None) -> None:
        """Of all rotary layers, for what follows; None: as each was made with.

        Raises ValueError where one was made with frequencies of its own, and for a base or factor
        where there is none.
        """
        ropes = [module for module in self.modules() if isinstance(module, Rope)]
        if not ropes and (base is not None or factor is not None):
            raise ValueError("the model has no rotary positions; allowed: no base or factor")
        for rope in ropes:
            rope.set(base=base, factor=factor)

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs, head included, of a token that sees `context` tokens with itself."""
        mixers = sum(layer.mixer.flops_per_token(context) for layer in self._layers)
        ffns = sum(ffn.flops_per_token() for ffn in self._ffns)
        return mixers + ffns + 2 * self.head_weight.numel()

    def state_elements(self, context: int) -> int:
        """Elements remembered per sequence while decoding, after `context` tokens."""
        return sum(layer.mixer.state_elements(context) for layer in self._layers)

    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - sum(ffn.idle_parameters() for ffn in self._ffns)

    @property
    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    @property
    def _ffns(self) -> list[FeedForward]:
        return [layer.ffn for layer in self._layers if layer.ffn is not None]


def _check_pattern(pattern: Sequence[str], mixers: Mapping[str, object]) -> None:
    if not pattern:
        raise ValueError("pattern is empty; it must name at least one mixer")
    for name in pattern:
        if name not in mixers:
            raise ValueError(f"pattern names {name!r}; allowed: {', '.join(sorted(mixers))}")
