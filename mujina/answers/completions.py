"""OpenAI's chat completions: a request as bytes, and what comes back as an answer, a failure, or what another try may mend."""

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import orjson

from mujina.answers.connection import Response
from mujina.answers.conversation import Answer, Failure, Request, seed_of
from mujina.user_input import UserError


class Broken(NamedTuple):
    """What came back is no answer; another try may bring one, after `wait` seconds or more."""

    told: str
    wait: float = 0.0


def body_of(request: Request, model: str) -> bytes:
    """The request for one answer; `n` is not used, since llama.cpp and transformers pass over it.

    Raises TypeError where a text holds half of a surrogate pair, the one thing in a request that JSON in UTF-8 cannot spell.
    """
    sampling = request.sampling
    return orjson.dumps(
        {
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in request.conversation.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed_of(request),
            "stream": False,
        }
    )


def answer_in(body: bytes, seconds: float) -> Answer | Failure | Broken:
    """Servers under load have been seen to send halves and HTML. What has no text is no empty answer."""
    try:
        values = _load(body)
        [choice] = values["choices"]
        text, reason = choice["message"]["content"], str(choice["finish_reason"] or "")
        if text is None:
            return Failure(f"an answer without a text (finish_reason {reason or 'none'}): look at what the server says to this prompt")
        usage, model = values.get("usage") or {}, values.get("model")
        prompt, answer = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(text.strip(), reason, prompt, answer, model if isinstance(model, str) else None, round(seconds, 3))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Broken(f"not a chat completion: {body[:200].decode(errors='replace')}")


def refusal(status: int, told: str, url: str, model: str) -> Failure:
    """Of a request that would be refused again. Raises UserError where any other would be as well."""
    remedies = {
        401: "set OPENAI_API_KEY to a key of this server",
        403: "set OPENAI_API_KEY to a key that may use this model",
        404: f"check that the URL ends as the server wants it, mostly in /v1, and that {model} is the name of a model there",
        **dict.fromkeys(range(300, 400), "write the URL that it names"),
    }
    words = f"{url}: {told}: {remedies.get(status, 'mend what it names, and start again')}"
    if status in remedies:
        raise UserError(words)
    return Failure(words)


def words_of(response: Response) -> str:
    return f"the server says {response.status} ({response.body[:500].decode(errors='replace').strip() or response.reason})"


def asked_wait(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, section 10.2.3); 0 where it does not."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _load(body: bytes) -> Any:
    """Half a surrogate pair, which JSON can spell and no text can hold, becomes a replacement character."""
    try:
        return orjson.loads(body)
    except ValueError:
        text = json.dumps(json.loads(body), ensure_ascii=False)
        return orjson.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
