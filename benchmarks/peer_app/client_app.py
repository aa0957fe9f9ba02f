"""What a client does with a message."""

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from benchmarks.peer_app.task import get_weights, load_model, load_rows, set_weights, settings
from benchmarks.peer_app.task import train as train_model

app = ClientApp()


@app.train()
def train(message, context):
    given = settings()
    rows = load_rows(context.node_config["partition-id"])
    model = load_model()
    set_weights(model, message.content["arrays"].to_torch_state_dict())
    loss = train_model(model, rows, given["local_steps"], given["batch_size"], given["learning_rate"])
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_weights(model)),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(rows)}),
        }
    )
    return FlowerMessage(content=content, reply_to=message)
