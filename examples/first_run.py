"""A first federation: six clients that each see digits in another visual domain, and one adapter at the end.

python examples/first_run.py
"""

from fedpeft import configure, simulate


def tell(event: dict) -> None:
    """Print a line for each evaluation; a run directory's metrics.jsonl holds all events."""
    if event["event"] == "evaluate":
        print(f"round {event['round']}: accuracy {event['accuracy']:.3f}")


config = configure(
    {
        "strategy.name": "lora-fair",
        "federation.rounds": 4,
        "simulation.workers": 0,  # in this process; leave it out for as many Ray workers as fit
    },
    preset="digits",
)
outcome = simulate(config, listener=tell)
print(f"the adapter is in {outcome.path / 'adapter'}")
