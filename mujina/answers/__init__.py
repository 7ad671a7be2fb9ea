"""Conversations in, answers out: from a Hugging Face folder on this machine, or from an OpenAI-compatible server.

    answerer = open_answerer("runs/hf/moe")                      # or "http://node-3:8000/v1#moe"
    for answers in answerer.answer([question("What is 3 + 4?")], Sampling(max_new_tokens=64)): ...

Every room may import this package; it imports no room, torch and transformers only when a folder is opened, and what HTTP needs only
when a server is.
"""

from pathlib import Path

from mujina.answers.conversation import (
    Answer,
    Answerer,
    Conversation,
    Failure,
    Message,
    PromptMessages,
    Request,
    Sampling,
    Session,
    question,
)
from mujina.answers.folder import FolderAnswerer
from mujina.user_input import UserError

__all__ = ["Answer", "Answerer", "Conversation", "Failure", "FolderAnswerer", "Message", "PromptMessages", "Request"]
__all__ += ["Sampling", "Session", "open_answerer", "question"]


def open_answerer(where: str, completes: bool = False) -> Answerer:
    """Opens a Hugging Face folder, or the model that `http://host:port/v1#model` names. Raises UserError when it is neither.

    Several servers of one model stand there with commas: `http://a:8000/v1,http://b:8000/v1#model`.
    With `completes` a folder without a chat template is let in as well, see `FolderAnswerer`.
    """
    if "://" not in where:
        return FolderAnswerer(Path(where), completes)
    from mujina.answers.server import ServerAnswerer  # with what it needs for HTTP, which nobody else does

    urls, _, model = where.partition("#")
    if not (model and all(url.startswith(("http://", "https://")) for url in urls.split(","))):
        raise UserError(f"{where}: is not of the form http://host:port/v1#model: write the server's URL, # and the name it gives the model")
    return ServerAnswerer(urls.split(","), model)
