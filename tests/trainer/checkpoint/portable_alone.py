"""Run by itself, without Longhaul on the path: what transformers makes of the folders named."""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import check_imports

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 257, "eos_token_id": None}


def check(folder: Path) -> None:
    for file in folder.glob("*.py"):
        check_imports(file)  # as for a folder of the hub: only what is installed
    tokens, expected, written = torch.load(folder.with_suffix(".pt"))
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model.generate(tokens[:, :20], **GREEDY), written)
    for beams in (1, 2):
        cached, whole = (
            model.generate(tokens[:, :9], num_beams=beams, use_cache=cache, **GREEDY)
            for cache in (True, False)
        )
        assert torch.equal(cached, whole)
    check_masks(model, tokens)
    model.save_pretrained(folder.with_name(f"{folder.name}_saved"))
    labels = tokens.clone()
    labels[:, :30] = -100
    logits = expected[:, 29:-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 30:].flatten())
    torch.testing.assert_close(model(tokens, labels=labels).loss, loss)
    check_dtypes(type(model).from_pretrained(folder, dtype=torch.bfloat16), tokens, expected)
    check_initial_values(folder)


def load(folder: Path, **keywords):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **keywords)


def check_masks(model, tokens) -> None:
    length = tokens.shape[1]
    mask = torch.ones_like(tokens)
    mask[0, :7] = mask[1, length - 5 :] = 0
    padded = model(tokens, attention_mask=mask).logits
    alone = [model(tokens[:1, 7:]).logits[0], model(tokens[1:, :-5]).logits[0]]
    torch.testing.assert_close(padded[0, 7:], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(padded[1, :-5], alone[1], rtol=0, atol=1e-4)
    assert "a cache holds" in refusal(model, tokens, attention_mask=mask, use_cache=True)
    mask[0, 9] = 0
    assert "zeros between ones" in refusal(model, tokens, attention_mask=mask)


def refusal(model, *arguments, **keywords) -> str:
    try:
        model(*arguments, **keywords)
    except ValueError as error:
        return str(error)
    return ""


def check_dtypes(model, tokens, expected) -> None:
    """Norms, gates and routers stay in fp32."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name for name in dtypes if name.endswith("norm.weight")} <= wide
    gates = ("gate.log_rate", "gate.bias", "router.weight", "router.bias")
    assert {name for name in dtypes if name.endswith(gates)} <= wide
    assert dtypes["model.embed.weight"] == torch.bfloat16 and len(wide) < len(dtypes)
    logits = model(tokens).logits
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def check_initial_values(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.vocab_size == 320 and config.num_hidden_layers == len(config.model["pattern"])
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert 0.015 < model.model.embed.weight.std() < 0.025


if __name__ == "__main__":
    assert importlib.util.find_spec("models") is None
    for name in sys.argv[1:]:
        check(Path(name))
        assert not [module for module in sys.modules if module.split(".")[0] == "models"]
