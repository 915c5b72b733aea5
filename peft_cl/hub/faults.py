"""What the Hub or the way to it refuses, said in one line with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from ..text import plain


#: Letters of what the Hub itself says.
MOST = 300
AGAIN = "Do it again: what is there already is not sent twice"
NEW_TOKEN = "Give one with the right to write by token=, or log in with `hf auth login`"
#: Status of an answer -> what it means, and the remedy.
MEANINGS = {
    401: f"the Hub does not know the token, or there is none (401). {NEW_TOKEN}",
    402: "the Hub asks for a paid plan (402). Choose another namespace, or upgrade it on the Hub",
    403: f"the token may not do this (403). {NEW_TOKEN}; or name a repository of your own",
    404: "there is no such repository, or the token may not read it (404). Correct the name, or log in with "
    "`hf auth login`",
    408: f"the Hub waited too long for the files (408). {AGAIN}",
    409: f"somebody else changes the repository at the same time (409). {AGAIN}",
    412: "somebody else has changed the repository in between (412). Look at the change, then do it again",
    413: "it is too large for the Hub (413). Leave the sums out by sums=False",
    429: "the Hub has got too many requests (429). Wait {wait}, then do it again",
}
SERVER = "the Hub has a fault of its own ({status}). Wait some minutes, then do it again"


class HubError(OSError):
    """The Hub, or the way to it, refused something; the message is one line and says what to do.

    Attributes:
        status: HTTP status of the Hub's answer; `None` where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def hub_faults(what: str, token: str | bool | None = None) -> Iterator[None]:
    """Turn the faults that `huggingface_hub` raises inside the block into a `HubError`.

    The client itself repeats what may be repeated (429, 5xx, a cut connection of most requests); a fault that arrives
    here is one that lasted.

    Args:
        what: What was tried, the first words of the message.
        token: A token that must not be in the message.

    Raises:
        HubError: with the reason and a remedy. Faults of other kinds pass.
    """
    try:
        yield
    except Exception as error:
        found = _of_the_hub(error)
        if found is None:
            raise
        message = f"{what}: {_meaning(found)}."
        if isinstance(token, str) and token:
            message = message.replace(token, "***")
        # Not "from error": its text may hold the request, and the chain would be printed.
        raise HubError(plain(message, None), _status(found)) from None


def _of_the_hub(error: BaseException | None) -> BaseException | None:
    """The fault of the Hub, or of the way to it, among those that led to this one; the first answer counts most."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for kinds in (HfHubHTTPError, OfflineModeIsEnabled, (HTTPError, LocalTokenNotFoundError), EntryNotFoundError):
        found = next((each for each in chain if isinstance(each, kinds)), None)
        if found is not None:
            return found
    is_short = [each for each in chain if isinstance(each, OSError) and "Consistency check failed" in str(each)]
    return is_short[0] if is_short else None


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _meaning(error: BaseException) -> str:
    status = _status(error)
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision (404). Correct revision="
    if status is not None and status >= 500:
        return SERVER.format(status=status)
    if status in MEANINGS:
        return MEANINGS[status].format(wait=_wait(error)) + _own_words(error)
    if status is not None:
        return f"the Hub refuses it ({status}){_own_words(error)}. Correct that, then do it again"
    if isinstance(error, OfflineModeIsEnabled) or HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so nothing is asked of the Hub. Unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token. {NEW_TOKEN}"
    if isinstance(error, EntryNotFoundError):
        return "the Hub cannot be reached, or has no such file. Check the network and the name"
    if "Consistency check failed" in str(error):
        return "a file came short, and was not kept. Do it again"
    return f"the connection to the Hub broke, or was never made ({type(error).__name__}). {AGAIN}"


def _wait(error: HfHubHTTPError) -> str:
    seconds = error.response.headers.get("Retry-After", "")
    return f"{seconds} s" if seconds.isdigit() else "some minutes"


def _own_words(error: HfHubHTTPError) -> str:
    """What the Hub says itself."""
    words = " ".join((error.server_message or "").split())
    return f". The Hub says: {plain(words, MOST).rstrip('.')}" if words else ""
