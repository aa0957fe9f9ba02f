"""A run that protects each row, and the statement of what it may claim.

python examples/private_run.py
"""

import json
import textwrap

from fedpeft import configure, simulate

config = configure(
    {
        "strategy.name": "fedit",
        "privacy.level": "record",
        "privacy.epsilon": 3.0,  # over ALL rounds
        "privacy.delta": 1e-5,
        "train.local_steps": 5,
        "federation.rounds": 3,
        "simulation.workers": 0,
    },
    preset="digits",
)
outcome = simulate(config)
claim = json.loads((outcome.path / "privacy.json").read_text(encoding="utf-8"))
print(f"accuracy {outcome.scores['accuracy']:.3f}, epsilon {claim['epsilon_max']:.3f} at delta {claim['delta']}")
print(f"guarantee: {claim['guarantee']}")  # a simulation's noise follows from its seed; privacy.rng=secure gives it
print(textwrap.fill(claim["statement"], 100))
