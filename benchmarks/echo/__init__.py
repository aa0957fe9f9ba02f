"""A client that sends back what it got, changed: what remains of a round is the engine's own work."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def echo(message: Message, context: Context) -> Message:
    """Return arrays of the same size that are new bytes, as those of a trained adapter are."""
    arrays = message.content.array_records["arrays"]
    changed = ArrayRecord({name: Array(array.numpy() + 1) for name, array in arrays.items()})
    return Message(RecordDict({"arrays": changed, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
