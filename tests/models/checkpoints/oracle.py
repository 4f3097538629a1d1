"""transformers' own models: the independent definition, seen through saved files."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import KimiLinearConfig, KimiLinearForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    # transformers gives the padding row of the embedding no gradient.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KDA, MLA = "linear_attention", "full_attention"
SHAPES = {
    # As released: three to one, first layer dense, heads of one number.
    "moe": {
        "layer_types": [KDA, KDA, KDA, MLA],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    # All dense, latent attention first, compressed queries, another convolution.
    "dense": {
        "layer_types": [MLA, KDA, MLA],
        "mlp_layer_types": ["dense", "dense", "dense"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 14,
        "linear_num_heads": 3,
        "linear_head_dim": 24,
        "linear_conv_kernel_dim": 3,
    },
    # All sparse, two shared experts, more heads in latent attention, another norm.
    "sparse": {
        "layer_types": [KDA, MLA],
        "mlp_layer_types": ["sparse", "sparse"],
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "n_shared_experts": 2,
        "linear_num_heads": 2,
        "linear_head_dim": 20,
        "rms_norm_eps": 1e-4,
    },
}


def make_peer(shape: str, **changes) -> KimiLinearForCausalLM:
    """Random everywhere: also norms, decays per head and the router's correction."""
    settings = COMMON | SHAPES[shape] | changes
    settings["num_hidden_layers"] = len(settings["layer_types"])
    peer = KimiLinearForCausalLM(KimiLinearConfig(**settings))
    randomise_peer(peer)
    return peer


def randomise_peer(peer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("A_log"):
                tensor.copy_(torch.linspace(-1.0, 1.0, tensor.numel()).view_as(tensor))
            elif tensor.dim() == 1:
                tensor.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                tensor.copy_(0.5 * noise * tensor.shape[-1] ** -0.5)


def save_gradients(peer: PreTrainedModel, folder: Path) -> None:
    """Gradients in the place of the weights, hence under the names that files have."""
    holder = copy.deepcopy(peer)
    for mine, theirs in zip(peer.parameters(), holder.parameters(), strict=True):
        theirs.data = torch.zeros_like(mine) if mine.grad is None else mine.grad.clone()
    holder.save_pretrained(folder)


def relative_error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of theirs, or over `floor` where that is larger."""
    return ((ours - theirs).norm() / theirs.norm().clamp_min(floor)).item()


class Wide(TorchFunctionMode):
    """transformers in fp64: where its code asks for fp32 it gets fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        if function is Tensor.float:
            return args[0].double()
        return function(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})
