"""Rows of one's own, in a CSV file whose column `site` says who holds what; the base is all-MiniLM-L6-v2.

pip install 'fedpeft[text]'
python examples/own_csv.py
"""

import csv
import random
from pathlib import Path

from fedpeft import configure, simulate

WORDS = {
    "billing": ("invoice", "refund", "charge", "receipt", "price"),
    "delivery": ("parcel", "courier", "driver", "address", "box"),
}
SITES = ("north", "south", "west")

draw = random.Random(0)
with Path("tickets.csv").open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["text", "label", "site"])
    for number in range(120):
        label = draw.choice(list(WORDS))
        text = f"please see to the {' and the '.join(draw.sample(WORDS[label], 2))}"
        writer.writerow([text, label, SITES[number % len(SITES)]])

config = configure(
    {
        "model.name": "preset:docstrings",  # or a transformers folder, or a hub id
        "data.source": "tickets.csv",
        "data.text": "text",
        "data.label": "label",
        "partition.by": "site",
        "train.local_steps": 4,
        "train.learning_rate": 5e-3,
        "federation.rounds": 2,
        "simulation.workers": 0,
    }
)
outcome = simulate(config)
print(f"{len(SITES)} sites, accuracy {outcome.scores['accuracy']:.3f}")
