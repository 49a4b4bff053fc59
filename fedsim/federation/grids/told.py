"""What every node is told beside its instruction: what was agreed on, and which run it is of."""

from collections.abc import Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict

from fedsim.messages.records import AGREED, EXPERIMENT


def tell_all(said: Mapping[str, str], messages: Sequence[Message]) -> None:
    """Add to instructions what every node is told; those that share their content go on to."""
    if not said:
        return
    records = {name: ConfigRecord({name: text}) for name, text in said.items()}
    made = dict[int, RecordDict]()
    for message in messages:
        content = message.content
        if id(content) not in made:
            made[id(content)] = RecordDict({**content, **records})
        message.content = made[id(content)]


def _taken_from(message: Message, name: str) -> str | None:
    """Take what every node is told out of an instruction; None where it does not say it.

    Args:
        message: The instruction.
        name: What it is about: `AGREED` or `EXPERIMENT`.
    """
    record = message.content.config_records.get(name) if message.has_content() else None
    if record is None:
        return None
    del message.content[name]
    return str(record[name])


def agreed_in(message: Message) -> str | None:
    """Take what sites agreed on out of an instruction; None where it does not say it."""
    return _taken_from(message, AGREED)


def experiment_of(message: Message) -> str | None:
    """Take out of an instruction which run it is of; None where it does not say it."""
    return _taken_from(message, EXPERIMENT)
