"""NAtS-L: every head remembers a chunk of tokens by softmax attention or in a recurrent state.

Neural Attention Search Linear, arXiv 2602.03681. B batch, S local seq, N chunks of C tokens, H
routed heads of K key and V value channels, each of which governs A / H of the A softmax heads.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.decay import ChannelDecay, HeadDecay
from models.mixer import Cache, Mixer, convolve, reset_taps
from models.norm import RMSNorm, l2_normalise
from models.ops.routed import RoutedKeys
from models.ops.routed_grid import ChunkGrid, chunk_grid
from models.ops.routed_softmax import remember
from models.ops.select import Ops
from models.precision import autocast, widen
from models.rope import make_rope
from models.routing import LearnedRouter, StaticRouter
from models.sequence import Fragment, SequenceInfo

# Settings that only some routers read.
LEARNED_ONLY = ("router_grad", "temperature", "softmax_target")
STATIC_ONLY = ("static_share",)


class NeuralAttentionSearch(Mixer):
    """[B, S, d_model] -> the same.

    A token attends to its own chunk and to the earlier ones that its head keeps, and reads a delta
    rule's state into which the other chunks were written. Both halves share q, k and v; each is
    normalised and weighted token by token.

    linear: one decay per head (gdn, arXiv 2412.06464) or per key channel (kda, arXiv 2510.26692).
    router: learned or, as controls, random or strided at `static_share`. router_grad: of the branch
    taken or, counterfactual, of both. softmax_target: the share of the tokens that the heads
    together are to keep, held by a bias. own_chunk: which halves see it. decay_softmax_chunks:
    whether the state decays over chunks that are not written to it.

    latent_rank: keys and values of the softmax heads come from a latent of their routed head (MLA,
    arXiv 2405.04434, by groups of heads), projected from the input and normalised; it is what is
    kept, cached and sent. Attention runs on latents, queries and outputs being projected instead of
    keys and values: the same numbers, if keys have no positions and no norm of their own.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        head_dim: int,
        softmax_heads: int,
        expand_v: int = 2,
        latent_rank: int | None = None,
        chunk: int = 64,
        linear: Literal["gdn", "kda"] = "gdn",
        negative_eigenvalues: bool = False,
        decay_softmax_chunks: bool = True,
        own_chunk: Literal["both", "softmax", "linear"] = "both",
        router: Literal["learned", "random", "strided"] = "learned",
        router_grad: Literal["selected", "counterfactual"] = "selected",
        temperature: float = 1.0,
        softmax_target: float | None = None,
        static_share: float = 0.25,
        mixing_from: Literal["q", "x"] = "q",
        rope_base: float | None = None,
        rope_factor: float = 1.0,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, head_dim=head_dim, conv_width=conv_width)
        positive(softmax_heads=softmax_heads, expand_v=expand_v, latent_rank=latent_rank)
        keys, values = num_heads * head_dim, num_heads * head_dim * expand_v
        if softmax_heads % num_heads or keys % softmax_heads:
            raise ValueError(
                f"softmax_heads is {softmax_heads}; it must be a multiple of num_heads = "
                f"{num_heads} and divide num_heads x head_dim = {keys}"
            )
        if latent_rank is not None and rope_base is not None:
            raise ValueError(
                f"rope_base is {rope_base} with latent_rank {latent_rank}; latents allow null"
            )
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"chunk is {chunk}; it must be a power of two")
        _check_router(
            router,
            router_grad=router_grad,
            temperature=temperature,
            softmax_target=softmax_target,
            static_share=static_share,
        )
        self.num_heads, self.softmax_heads, self.token_multiple = num_heads, softmax_heads, chunk
        self.widths = [keys, keys, values]
        self.mixing_from, self.beta_scale = mixing_from, 2.0 if negative_eigenvalues else 1.0
        counterfactual = router_grad == "counterfactual"
        self.router: LearnedRouter | StaticRouter
        if router == "learned":
            self.router = LearnedRouter(
                d_model,
                num_heads=num_heads,
                temperature=temperature,
                target=softmax_target,
                counterfactual=counterfactual,
            )
        else:
            strided = router == "strided"
            self.router = StaticRouter(num_heads=num_heads, share=static_share, strided=strided)
        self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), conv_width))
        self.decay: ChannelDecay | HeadDecay
        if linear == "gdn":
            self.decay = HeadDecay(d_model, num_heads=num_heads)
        else:
            self.decay = ChannelDecay(d_model, num_heads=num_heads, head_dim=head_dim)
        self.beta_proj = nn.Linear(d_model, num_heads, bias=False)
        softmax_dim = keys // softmax_heads
        self.latent_rank, self.softmax_dim = latent_rank, softmax_dim
        self.q_norm = RMSNorm(softmax_dim, eps=norm_eps)
        if latent_rank is None:
            self.k_norm = RMSNorm(softmax_dim, eps=norm_eps)
        else:
            self.latent_down = nn.Linear(d_model, num_heads * latent_rank, bias=False)
            self.latent_norm = RMSNorm(latent_rank, eps=norm_eps)
            self.latent_up = nn.Linear(latent_rank, keys + values, bias=False)  # head by head
        self.rope = make_rope(
            softmax_dim, base=rope_base, factor=rope_factor, scaling=None, frequencies=None
        )
        self.softmax_norm, self.linear_norm = (
            RMSNorm(values // softmax_heads, eps=norm_eps) for _ in range(2)
        )
        mixing_width = keys if mixing_from == "q" else d_model
        self.mixing_proj = nn.Linear(mixing_width, 2 * softmax_heads, bias=False)
        self.gate_proj = nn.Linear(d_model, values, bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.conv = ops.conv()
        self.attention = ops.routed_attention(
            chunk=chunk, own=own_chunk != "linear", counterfactual=counterfactual
        )
        self.recurrence = ops.routed_delta_rule(
            chunk=chunk, own=own_chunk != "softmax", decays=decay_softmax_chunks
        )

    def reset_parameters(self, std: float) -> None:
        reset_taps(self.conv_weight)
        if isinstance(self.router, StaticRouter):
            self.router.reset_salt()

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        mixed = F.silu(convolve(self.conv, self.qkv_proj(x), self.conv_weight, info, cache))
        q, k, v = mixed.split(self.widths, dim=-1)
        pooled, qkv, seq = x, [q, k, v], x.shape[1]
        if cache is not None:
            pooled, qkv, info = _behind_open_chunk(x, qkv, info, cache, self.token_multiple)
        grid = chunk_grid(info, self.token_multiple)
        keep, write = self.router(grid.mean(pooled), grid)
        by_softmax = self._attend(pooled, qkv, keep, grid, info, cache)[:, -seq:]
        by_state = self._recur(pooled, qkv, grid.spread(write), info, cache)[:, -seq:]
        weights = self.mixing_proj(q if self.mixing_from == "q" else x)
        weights = widen(weights).unflatten(-1, (-1, 1, 2)).softmax(-1)  # [B, S, A, 1, 2]
        by_state = by_state.flatten(2).unflatten(-1, (self.softmax_heads, -1))
        y = widen(self.softmax_norm(by_softmax)) * weights[..., 0]
        y = y + widen(self.linear_norm(by_state)) * weights[..., 1]
        y = y.flatten(2) * F.silu(widen(self.gate_proj(x)))
        return self.out_proj(y.to(x.dtype))

    def _attend(
        self,
        x: Tensor,
        qkv: list[Tensor],
        keep: Tensor,
        grid: ChunkGrid,
        info: SequenceInfo,
        cache: Cache | None,
    ) -> Tensor:
        """The softmax half, [B, S, A, V x H / A]; caches the kept chunks."""
        q, k, v = (y.unflatten(-1, (self.softmax_heads, -1)) for y in qkv)
        q = self.q_norm(q)
        if self.latent_rank is not None:
            up_k, up_v = self._up_weights()
            q = torch.einsum("bsad,adr->bsar", q, up_k)
            latent = self.latent_norm(self.latent_down(x).unflatten(-1, (self.num_heads, -1)))
            y = self._attend_to((latent,), q, keep, grid, info, cache)
            return torch.einsum("bsar,adr->bsad", y, up_v)
        k = self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, info), self.rope(k, info)
        keep = keep.repeat_interleave(self.softmax_heads // self.num_heads, dim=-1)
        return self._attend_to((k, v), q, keep, grid, info, cache)

    def _attend_to(
        self,
        kv: tuple[Tensor, ...],
        q: Tensor,
        keep: Tensor,
        grid: ChunkGrid,
        info: SequenceInfo,
        cache: Cache | None,
    ) -> Tensor:
        """kv: keys and values, or latents that are both."""
        past, names = None, ("kept_k", "kept_v")[: len(kv)]
        if cache is not None and "kept_start" in cache:
            past = RoutedKeys(tuple(cache[name] for name in names), cache["kept_start"])
        k, v = kv[0], kv[1] if len(kv) == 2 else None
        scale = self.softmax_dim**-0.5
        y = self.attention(q, k, v, grid.spread(keep), info, scale=scale, past=past)
        if cache is not None:
            kept, cache["kept_start"] = remember(past, kv, keep, grid)
            cache.update(zip(names, kept, strict=True))
        return y

    def _up_weights(self) -> tuple[Tensor, Tensor]:
        """From a latent to the key and to the value of each softmax head, [A, dim, rank]."""
        (weight,) = autocast(self.latent_up.weight)  # like that of a linear layer
        weight = weight.unflatten(0, (self.softmax_heads, -1))
        return weight[:, : self.softmax_dim], weight[:, self.softmax_dim :]

    def _recur(
        self,
        x: Tensor,
        qkv: list[Tensor],
        write: Tensor,
        info: SequenceInfo,
        cache: Cache | None,
    ) -> Tensor:
        """The linear half, [B, S, H, V]; caches the state that enters the chunk that is open."""
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        q, k = l2_normalise(q) * q.shape[-1] ** -0.5, l2_normalise(k)
        beta = self.beta_scale * widen(self.beta_proj(x)).sigmoid()
        tensors = q, k, v, self.decay(x), beta
        if cache is None:
            return self.recurrence(*tensors, info, write=write).output
        state = cache.get("state")
        if state is None:
            state = widen(v).new_zeros(len(x), self.num_heads, k.shape[-1], v.shape[-1])
        outputs = []
        whole = x.shape[1] - x.shape[1] % self.token_multiple
        for part in (slice(0, whole), slice(whole, x.shape[1])):
            cache["state"] = state  # in the end, that before the second part
            if part.start < part.stop:
                output, state = self.recurrence(
                    *(y[:, part] for y in tensors),
                    _part(info, part),
                    initial_state=state,
                    write=write[:, part],
                )
                outputs.append(output)
        return torch.cat(outputs, dim=1)

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, read, write and query of the state, and softmax attention to
        half a chunk and to the share of the context that the router is expected to keep."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        keys, _, values = self.widths
        state = 3 * keys * values // self.num_heads
        seen = self.token_multiple / 2 + self.router.expected_share * context
        width = keys + values
        if self.latent_rank is not None:
            width = 2 * self.softmax_heads * self.latent_rank
        attention = width * seen
        return 2 * (linears + self.conv_weight.numel() + state + attention)

    def state_elements(self, context: int) -> int:
        """At most: when every chunk is kept."""
        keys, _, values = self.widths
        chunks, open_tokens = divmod(context, self.token_multiple)
        heads, width = self.softmax_heads, keys + values  # of what is kept
        if self.latent_rank is not None:
            heads, width = self.num_heads, self.num_heads * self.latent_rank
        kept = chunks * (self.token_multiple * width + heads)
        held = open_tokens * (self.out_proj.out_features + keys + values)
        history = (self.conv_weight.shape[1] - 1) * self.conv_weight.shape[0]
        return keys * values // self.num_heads + history + kept + held


def _check_router(router: str, **settings: object) -> None:
    """Raises ValueError for a setting that was changed and that this router does not read."""
    learned = router == "learned"
    defaults = NeuralAttentionSearch.__init__.__kwdefaults__ or {}
    for name in STATIC_ONLY if learned else LEARNED_ONLY:
        if settings[name] != defaults[name]:
            others = "random or strided" if learned else "learned"
            raise ValueError(f"{name} is {settings[name]} with router {router}; it needs {others}")


def _behind_open_chunk(
    x: Tensor, qkv: list[Tensor], info: SequenceInfo, cache: Cache, chunk: int
) -> tuple[Tensor, list[Tensor], SequenceInfo]:
    """x, q, k, v behind the cached ones of the chunk that they go on with, so that a row starts
    with a chunk; caches those of the chunk that stays open. Queries answered before are zero."""
    q, k, v = qkv
    held = info.fragments[0][0].position % chunk
    info = info.history(held + x.shape[1])
    stays = (held + x.shape[1]) % chunk
    extended = []
    for name, new in (("open_x", x), ("open_k", k), ("open_v", v)):
        if held:
            new = torch.cat((cache[name], new), dim=1)
        cache[name] = new[:, new.shape[1] - stays :].clone()
        extended.append(new)
    x, k, v = extended
    return x, [F.pad(q, (0, 0, held, 0)), k, v], info


def _part(info: SequenceInfo, part: slice) -> SequenceInfo:
    """Of a row that is a stretch of one document."""
    (whole, *_), *_ = info.fragments
    place = whole.index + part.start, whole.position + part.start
    fragment = Fragment(part.stop - part.start, *place)
    return SequenceInfo.from_fragments([[fragment]] * info.shape[0], info.index.device)
