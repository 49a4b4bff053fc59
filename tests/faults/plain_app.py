"""An ordinary Flower ClientApp, of Flower's public API alone, that counts its messages."""

import os
import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def _counted(context: Context) -> int:
    """Count this message in the client's own memory."""
    before = context.state.metric_records.get("memory")
    count = 1 if before is None else int(before["messages"]) + 1
    context.state["memory"] = MetricRecord({"messages": count})
    return count


def _answer(message: Message, context: Context) -> Message:
    count = _counted(context)
    me = int(context.node_config["partition-id"])
    config = message.content.config_records.get("config", {})
    if me == config.get("raises"):
        raise ValueError("the battery is empty")
    if me == config.get("exits"):
        os._exit(1)
    if me == config.get("sleeps"):
        time.sleep(float(config["seconds"]))
    if me == config.get("forgets"):
        context.state.clear()
    numbers = {
        "num-examples": 1,
        "messages": count,
        "client": me,
        "clients": int(context.node_config["num-partitions"]),
    }
    content = RecordDict({"metrics": MetricRecord(numbers)})
    if "arrays" in message.content:
        (array,) = message.content["arrays"].to_numpy_ndarrays()
        content["arrays"] = ArrayRecord([array + me])
        # what clients do with what they received is nobody else's business
        message.content["arrays"].clear()
        del message.content["config"]
    return Message(content, reply_to=message)


app.train()(_answer)
app.evaluate()(_answer)
app.query()(_answer)
