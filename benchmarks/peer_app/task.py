"""Model, rows and local training."""

import json
import os
from functools import lru_cache
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

VARIABLE = "PEER_APP_SETTINGS"  # names the file of settings; the simulation's workers inherit it


@lru_cache
def settings():
    return json.loads(Path(os.environ[VARIABLE]).read_text())


@lru_cache
def load_rows(partition):
    """Return the encoded rows of a client, or the test rows for None."""
    given = settings()
    rows = datasets.load_from_disk(given["data"])["test" if partition is None else "train"]
    if partition is not None:
        rows = rows.select(given["partitions"][partition])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    encoded = tokenizer(
        list(rows["text"]), padding="max_length", truncation=True, max_length=given["max_length"], return_tensors="pt"
    )
    return TensorDataset(encoded["input_ids"], encoded["attention_mask"], torch.tensor(rows["label"]))


def load_model():
    """Return the base model with a new adapter, and its head to be trained."""
    given = settings()
    base = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=given["num_labels"])
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=given["head"]
    )
    return get_peft_model(base, lora)


def get_weights(model):
    return get_peft_model_state_dict(model)


def set_weights(model, weights):
    set_peft_model_state_dict(model, weights)


def train(model, rows, steps, batch_size, learning_rate):
    """Take so many steps over shuffled passes, and return the mean loss."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )
    model.train()
    losses = []
    while len(losses) < steps:
        for input_ids, attention_mask, labels in DataLoader(rows, batch_size=batch_size, shuffle=True):
            optimizer.zero_grad()
            loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model, rows):
    model.eval()
    right = 0
    for input_ids, attention_mask, labels in DataLoader(rows, batch_size=64):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        right += int((logits.argmax(-1) == labels).sum())
    return right / len(rows)
