"""Conversations in, answers out: from a Hugging Face folder on this machine, or from an OpenAI-compatible server.

    answerer = open_answerer("runs/hf/moe")                      # or "http://node-3:8000/v1#moe"
    for answers in answerer.answer([question("What is 3 + 4?")], Sampling(max_new_tokens=64)): ...

Every room may import this package; it imports no room, and torch and transformers only when a folder is opened.
"""

from pathlib import Path

from mujina.answers.conversation import Answer, Answerer, Conversation, Message, Sampling, question
from mujina.answers.folder import FolderAnswerer
from mujina.answers.server import ServerAnswerer
from mujina.user_input import UserError

__all__ = ["Answer", "Answerer", "Conversation", "FolderAnswerer", "Message", "Sampling", "ServerAnswerer", "open_answerer", "question"]


def open_answerer(where: str, completes: bool = False) -> Answerer:
    """Opens a Hugging Face folder, or the model that `http://host:port/v1#model` names. Raises UserError when it is neither.

    With `completes` a folder without a chat template is let in as well, see `FolderAnswerer`.
    """
    if "://" not in where:
        return FolderAnswerer(Path(where), completes)
    url, _, model = where.partition("#")
    if not (url.startswith(("http://", "https://")) and model):
        raise UserError(f"{where}: is not of the form http://host:port/v1#model: write the server's URL, # and the name it gives the model")
    return ServerAnswerer(url, model)
