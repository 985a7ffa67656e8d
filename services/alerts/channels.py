"""Where alerts go: webhooks, and whatever `apprise` takes. A URL is never logged, shown or put into an error."""

from __future__ import annotations

import base64
import http.client
import logging
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec

from services.alerts.rules import instant
from shared.alerts import PENDING, REFUSED, SENT, WEBHOOK, Alert, scheme
from shared.errors import ConfigError, TapelineError
from shared.log import Masker
from shared.settings import Settings

TIMEOUT_SECONDS = 10.0
RETRY_AFTER_MAX_SECONDS = 3600.0
# Answers that say "later", not "no".
_LATER = (408, 425, 429)


@dataclass(frozen=True, slots=True)
class Message:
    """What a channel is given. `key` is the same whenever the same delivery is tried again."""

    key: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """SENT, REFUSED for good, or PENDING: try again, not before `after` seconds if the channel named a time."""

    state: str
    reason: str = ""
    after: float = 0.0


class Channel(Protocol):
    """One channel. `send` never raises; it may take as long as its timeout."""

    def send(self, message: Message) -> Answer: ...


def message_of(alert: Alert, number: int) -> Message:
    """A round of an alert: only what is fixed for it, so that a retry says the same under the same key."""
    body = {
        "id": alert.id, "severity": alert.severity, "type": alert.type, "key": alert.key, "title": alert.title,
        "text": alert.text, "at": instant(alert.at_ms), "raised_at": instant(alert.first_ms), "round": number,
        "details": alert.details,
    }  # fmt: skip
    return Message(alert.id if number == 0 else f"{alert.id}:{number}", body)


def open_channel(settings: Settings, name: str) -> Channel:
    """The channel of this name. Raises ConfigError when its URL cannot be used, or needs apprise and there is none."""
    url = settings.alerts.channels[name]
    mask = Masker(settings)
    return Webhook(url, mask) if scheme(url) in WEBHOOK else AppriseChannel(name, url, mask)


def send_test(settings: Settings, name: str) -> None:
    """Send a test message, once. Raises ConfigError, or TapelineError with what the channel answered."""
    now = int(time.time() * 1000)
    key = f"test-{now:x}"
    body = Alert(
        key, "test", "test", "INFO", f"Test of channel {name}", "Tapeline can reach this channel.", now, now, now
    )
    answer = open_channel(settings, name).send(message_of(body, 0))
    if answer.state != SENT:
        raise TapelineError(f"channel {name}: {answer.reason}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body, and count as delivered."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhook:
    """POSTs JSON with `Idempotency-Key`; 2xx is delivered, other answers but 408, 425, 429 and 5xx are final."""

    def __init__(self, url: str, mask: Masker, timeout: float = TIMEOUT_SECONDS) -> None:
        parts = urlsplit(url)
        self._headers = {"Content-Type": "application/json", "User-Agent": "tapeline"}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path or "/", parts.query, ""))
        self._mask, self._timeout = mask, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def send(self, message: Message) -> Answer:
        headers = self._headers | {"Idempotency-Key": message.key}
        body = msgspec.json.encode(message.body)
        try:
            request = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310 - http(s), checked
            with self._opener.open(request, timeout=self._timeout):
                return Answer(SENT)
        except urllib.error.HTTPError as error:
            with error:
                return self._answered(error.code, error.headers.get("Retry-After") or "")
        except urllib.error.URLError as error:
            return Answer(PENDING, self._mask(f"cannot be reached ({error.reason})"))
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            return Answer(PENDING, self._mask(f"cannot be reached ({error or type(error).__name__})"))
        except ValueError as error:
            return Answer(REFUSED, self._mask(f"the URL cannot be used ({type(error).__name__})"))

    def _answered(self, code: int, retry_after: str) -> Answer:
        said = f"answered {code} {http.client.responses.get(code, '')}".rstrip()
        if code in _LATER or code >= 500:
            return Answer(PENDING, said, _seconds(retry_after))
        if 300 <= code < 400:
            said += ": set the channel to where that leads"
        return Answer(REFUSED, said)


def _seconds(retry_after: str) -> float:
    """Of a `Retry-After` (seconds or a date), at most an hour; 0 for none or nonsense."""
    try:
        wait = (
            float(retry_after)
            if retry_after.strip().isdigit()
            else (parsedate_to_datetime(retry_after).timestamp() - time.time() if retry_after else 0.0)
        )
    except (ValueError, OverflowError):
        return 0.0
    return min(RETRY_AFTER_MAX_SECONDS, max(0.0, wait))


class AppriseChannel:
    """Any service that apprise knows. It says only whether it worked, so what did not is tried again."""

    def __init__(self, name: str, url: str, mask: Masker) -> None:
        try:
            apprise: Any = import_module("apprise")
        except ImportError:
            raise ConfigError(
                f"alerts.channels.{name} needs apprise ({scheme(url)}:// is no webhook): pip install 'tapeline[alerts]'"
            ) from None
        # What apprise says may hold the URL, or be said where nothing is masked: a failure is told by our own line.
        logging.getLogger("apprise").propagate = False
        self._kinds = {"INFO": apprise.NotifyType.INFO, "WARNING": apprise.NotifyType.WARNING}
        self._failure = apprise.NotifyType.FAILURE
        self._mask = mask
        self._target = apprise.Apprise()
        if not self._target.add(url):
            raise ConfigError(
                f"alerts.channels.{name}: apprise does not understand this {scheme(url)}:// URL; "
                "its documentation has the form for each service"
            )

    def send(self, message: Message) -> Answer:
        body = message.body
        text = f"{body['text']}\n{body['type']} of {body['at']}, alert {message.key}"
        kind = self._kinds.get(body["severity"], self._failure)
        try:
            result = self._target.notify(body=text, title=f"{body['severity']}: {body['title']}", notify_type=kind)
        except Exception as error:  # whatever a service's plug-in raises must not end the thread of its channel
            return Answer(PENDING, self._mask(f"apprise failed ({type(error).__name__})"))
        if result:
            return Answer(SENT)
        said = [str(entry.message) for entry in result.logs()] if hasattr(result, "logs") else []  # since 2.2
        return Answer(PENDING, self._mask(f"apprise could not deliver it{': ' + said[-1] if said else ''}"))
