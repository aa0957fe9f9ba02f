"""Prompts: virtual tokens before those of a text, while no weight of the model changes.

* ``prompt-tuning`` trains their embeddings (B. Lester et al., arXiv 2104.08691).
* ``prefix-tuning`` trains their keys and values in every layer (X. L. Li and P. Liang, arXiv 2101.00190), without the
  paper's network over them: PEFT saves what such a network gives, and cannot train on from it.
* ``p-tuning`` trains a small network that makes their embeddings (X. Liu et al., arXiv 2103.10385). The network's
  weights are what is averaged; an export holds the embeddings that the mean of networks makes, as PEFT loads them.

PEFT can give keys and values to causal models alone, as transformers is now; texts are classified with the other two.
The first two train the prompt itself, of which a mean is exact. A causal model gives logits of the virtual tokens as
well; they are cut off, so that logits and labels have the same positions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.kinds.kind import Kind, Start, always
from fedpeft.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

TOKENS = 20  # as in most of PEFT's examples, where users say nothing
PARTS = ("prompt_embeddings", "prompt_encoder")
# PEFT finds them in the model's configuration
OF_MODEL = dict.fromkeys(("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"))
CLOSE = 0.01  # of the largest logit: far over rounding in bfloat16


def _no_modules(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    if targets is not None:
        raise AdapterError(
            f"adapter.targets = {','.join(targets)}: virtual tokens change no module of the model; drop it."
        )
    return []


def _tokens(model: nn.Module, targets: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_virtual_tokens": options.get("num_virtual_tokens") or TOKENS}


def _tokens_and_width(model: Any, targets: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    width = options.get("encoder_hidden_size") or model.config.get_text_config().hidden_size
    return {**_tokens(model, targets, options), "encoder_hidden_size": width}


def _embeddings(model: PeftModel) -> dict[str, Tensor]:
    return {"prompt_embeddings": _encoder(model).embedding.weight}


def _network(model: PeftModel) -> dict[str, Tensor]:
    return {f"prompt_encoder.{name}": parameter for name, parameter in _encoder(model).named_parameters()}


def _encoder(model: Any) -> Any:
    return model.prompt_encoder["default"]


def _as_embeddings(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what PEFT saves: the embeddings that a network makes, in place of its weights."""
    import torch

    encoder = copy.deepcopy(_encoder(model)).eval()
    weights = {name: name.removeprefix("prompt_encoder.") for name in tensors if name.startswith("prompt_encoder.")}
    encoder.load_state_dict({inner: tensors[name] for name, inner in weights.items()})
    with torch.no_grad():
        made = encoder(model.prompt_tokens["default"].to(encoder.embedding.weight.device)[None])[0]
    return {"prompt_embeddings": made.cpu()} | {name: each for name, each in tensors.items() if name not in weights}


def _of_texts_tokens(model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
    """Cut the logits of virtual tokens off."""
    ids = inputs.get("input_ids", args[0] if args else None)
    if ids is not None and output.logits.ndim == 3:
        output.logits = output.logits[:, -ids.shape[1] :]
    return output


def _install(model: PeftModel, start: Start, prepared: Any) -> None:
    """Let logits be those of the text's tokens, after a look at whether the model can be prompted at all."""
    model.register_forward_hook(_of_texts_tokens, with_kwargs=True)
    if problem := _problem(model):
        raise AdapterError(
            f"adapter.kind: virtual tokens ({type(start.settings).__name__}) do not work with this model "
            f"({type(start.model).__name__}): {problem}. Take another adapter.kind, such as lora."
        )


def _problem(model: Any) -> str:
    """Return why a model cannot be prompted, by what it makes of two tokens with and without padding behind them."""
    import torch

    text = model.config.get_text_config()
    pad = getattr(text, "pad_token_id", None) or 0
    ids = [token for token in range(4) if token != pad][:2]
    on, modes = model.device, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        plain = model(input_ids=torch.tensor([ids], device=on), attention_mask=torch.ones(1, 2, device=on)).logits
        padded = model(
            input_ids=torch.tensor([[*ids, pad]], device=on), attention_mask=torch.tensor([[1.0, 1.0, 0.0]], device=on)
        ).logits.detach()
        trained = list(_encoder(model).parameters())
        slopes = torch.autograd.grad(plain.float().square().sum(), trained, allow_unused=True)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        return f"PEFT cannot run it: {error}".rstrip(".")
    finally:
        for module, training in modes:
            module.training = training
    if not any(slope is not None and slope.any() for slope in slopes):
        return "it does not look at them"
    if padded.ndim == 3:
        padded = padded[:, :2]
    if (padded - plain).abs().max() > CLOSE * plain.abs().max():
        return "where texts are padded, it reads its answer from the padding, as PEFT runs it"
    return ""


PROMPT_TUNING = Kind(
    name="prompt-tuning",
    config="PromptTuningConfig",
    update="linear",
    parts=PARTS,
    rank=(),
    settings=OF_MODEL,
    merges=False,
    prompts=True,
    moved=always,
    prefix="base_model.",
    choose=_no_modules,
    fit=_tokens,
    live=_embeddings,
    install=_install,
    quantised=True,
)
PREFIX_TUNING = replace(
    PROMPT_TUNING,
    name="prefix-tuning",
    config="PrefixTuningConfig",
    settings={**OF_MODEL, "prefix_projection": False, "encoder_hidden_size": None},
)
P_TUNING = replace(
    PROMPT_TUNING,
    name="p-tuning",
    config="PromptEncoderConfig",
    update="neither",
    fit=_tokens_and_width,
    live=_network,
    export=_as_embeddings,
)
