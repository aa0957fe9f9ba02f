"""Python code that loads what a run leaves, as its page shows it."""

from __future__ import annotations

from pathlib import Path

from fedpeft import tasks
from fedpeft.config import RunConfig
from fedpeft.runs import ADAPTER, read_object


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
    task = tasks.of(config)
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    reader, inputs = ("AutoImageProcessor", "processor") if task.reads_images else ("AutoTokenizer", "tokenizer")
    lines = [
        *(["import json"] if task.has_labels else []),
        "from pathlib import Path",
        "",
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted([task.auto, reader]))}",
        "",
        f"base_name = {base!r}",
        f"adapter = Path({str(run.resolve() / ADAPTER)!r})",
        f"{inputs} = {reader}.from_pretrained(base_name{trust})",
    ]
    if not task.has_labels:
        settings = dict(task.settings) | ({"ignore_mismatched_sizes": True} if task.has_head else {})
        fields = "".join(f", {name}={value!r}" for name, value in settings.items())
        lines.append(f"base = {task.auto}.from_pretrained(base_name{trust}{fields})")
    else:
        lines += [
            'labels = json.loads((adapter / "labels.json").read_text(encoding="utf-8"))',
            f"base = {task.auto}.from_pretrained(",
            f"    base_name{trust},",
            "    id2label=dict(enumerate(labels)),",
            "    label2id={name: index for index, name in enumerate(labels)},",
            "    ignore_mismatched_sizes=True,  # the head comes with the adapter",
            ")",
        ]
    if task.reads_last_token:
        lines += [
            "if base.config.pad_token_id is None:",
            "    base.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id",
        ]
    lines.append("model = PeftModel.from_pretrained(base, str(adapter)).eval()")
    return "\n".join(lines) + "\n"
