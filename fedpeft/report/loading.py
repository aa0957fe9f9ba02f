"""Python code that loads what a run leaves, as its page shows it."""

from __future__ import annotations

from pathlib import Path

from fedpeft.config import RunConfig
from fedpeft.runs import ADAPTER, read_object

CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}


def loading_code(run: Path, config: RunConfig) -> str:
    """Return Python code that loads a run's adapter with transformers and PEFT alone.

    Parameters
    ----------
    run : Path
        The run directory; its adapter names the base model, where it is written already.
    config : RunConfig
        The run's.
    """
    described = read_object(run / ADAPTER / "adapter_config.json")
    base = str(described.get("base_model_name_or_path") or config.model.name or "BASE_MODEL")
    kind, causal = CLASSES[config.task], config.task == "causal-lm"
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    of_images = config.task == "image-classification"
    reader, inputs = ("AutoImageProcessor", "processor") if of_images else ("AutoTokenizer", "tokenizer")
    lines = [
        *([] if causal else ["import json"]),
        "from pathlib import Path",
        "",
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted([kind, reader]))}",
        "",
        f"base_name = {base!r}",
        f"adapter = Path({str(run.resolve() / ADAPTER)!r})",
        f"{inputs} = {reader}.from_pretrained(base_name{trust})",
    ]
    if causal:
        lines.append(f"base = {kind}.from_pretrained(base_name{trust})")
    else:
        lines += [
            'labels = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))',
            f"base = {kind}.from_pretrained(",
            f"    base_name{trust},",
            "    id2label=dict(enumerate(labels)),",
            "    label2id={name: index for index, name in enumerate(labels)},",
            "    ignore_mismatched_sizes=True,  # the head comes with the adapter",
            ")",
        ]
    if config.task == "sequence-classification":
        lines += [
            "if base.config.pad_token_id is None:",
            "    base.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id",
        ]
    lines.append("model = PeftModel.from_pretrained(base, str(adapter)).eval()")
    return "\n".join(lines) + "\n"
