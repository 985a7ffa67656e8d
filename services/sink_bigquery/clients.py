"""Google's clients: where the dataset is, with what credentials, and what their errors mean here.

Importing this module without the extra `bigquery` raises ConfigError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.errors import AuthError, ConfigError, StoreUnavailable, TapelineError
from shared.settings import BigQuery, Settings
from shared.stores import SCHEMES, parse, redact

try:
    import requests
    from google.api_core import exceptions as google
    from google.api_core.client_options import ClientOptions
    from google.auth import exceptions as auth
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import bigquery
except ImportError:
    raise ConfigError(
        "the BigQuery store needs Google's clients, which are not installed: pip install 'tapeline[bigquery]'"
    ) from None

__all__ = [
    "BUFFERED", "CALL_SECONDS", "Missing", "Refused", "Target", "bigquery", "call", "connect", "errors", "google",
    "line", "passes", "reason_of", "target_at", "target_of",
]  # fmt: skip
EMULATOR = "BIGQUERY_EMULATOR_HOST"
CALL_SECONDS = 60.0
# The projects and datasets that BigQuery names; a project may belong to a domain (example.com:project).
_STORE = re.compile(r"^bigquery://([A-Za-z0-9.:-]+)/([A-Za-z0-9_]+)/?$", re.IGNORECASE)
_PASSING = frozenset(
    (
        "backendError", "internalError", "jobBackendError", "jobInternalError", "jobRateLimitExceeded",
        "quotaExceeded", "rateLimitExceeded", "stopped", "tableUnavailable", "timeout",
    )
)  # fmt: skip
BUFFERED = "streaming buffer"
_T = TypeVar("_T")


class Refused(TapelineError):
    """BigQuery finds the request itself wrong (a bad row, a bad statement)."""


class Missing(TapelineError):
    """A dataset, table, job or stream that does not exist."""


@dataclass(frozen=True, slots=True)
class Target:
    """A dataset and the way to it. `where` is for people."""

    project: str
    dataset: str
    settings: BigQuery

    @property
    def where(self) -> str:
        return f"BigQuery {self.project}.{self.dataset}"

    @property
    def endpoint(self) -> str:
        """A local server's URL; empty for Google's."""
        text = self.settings.endpoint or os.environ.get(EMULATOR, "")
        return text if "://" in text or not text else f"http://{text}"

    def full(self, table: str) -> str:
        """`project.dataset.table`."""
        return f"{self.project}.{self.dataset}.{table}"

    def named(self, table: str) -> str:
        """The table as SQL names it."""
        return f"`{self.full(table)}`"


def target_of(settings: Settings) -> Target:
    """The dataset that these settings write: that of a bigquery:// store, else [bigquery]'s. Raises ConfigError."""
    store = settings.tapeline.store
    if parse(store).scheme == "bigquery":
        return target_at(store, settings.bigquery)
    section = settings.bigquery
    if not section.project or not section.dataset:
        raise ConfigError(
            f"sink-bigquery has no dataset: write TAPELINE_STORE={SCHEMES['bigquery']}, or set bigquery.project and "
            "bigquery.dataset (GCP_PROJECT_ID and BIGQUERY_DATASET)"
        )
    return Target(section.project, section.dataset, section)


def target_at(url: str, settings: BigQuery) -> Target:
    """The dataset of a bigquery:// URL. Raises ConfigError."""
    match = _STORE.match(url)
    if match is None:
        raise ConfigError(f"'{redact(url)}' names no dataset; write {SCHEMES['bigquery']}")
    return Target(match[1], match[2], settings)


def connect(target: Target) -> Any:
    """A bigquery.Client. Raises AuthError without credentials, StoreUnavailable."""
    with errors(target, "connect"):
        if target.endpoint:
            return bigquery.Client(
                project=target.project,
                credentials=AnonymousCredentials(),
                location=target.settings.location,
                client_options=ClientOptions(api_endpoint=target.endpoint),
            )
        return bigquery.Client(project=target.project, location=target.settings.location)


def reason_of(error: Any) -> str:
    """BigQuery's own word for an API error (`rateLimitExceeded`); empty where it gives none."""
    found = getattr(error, "errors", None) or ()
    first = found[0] if found else None
    return str(first.get("reason", "")) if isinstance(first, dict) else ""


def passes(reason: str, message: str = "") -> bool:
    """Whether a failure is over after a while: waiting helps."""
    return reason in _PASSING or BUFFERED in message


@contextmanager
def errors(target: Target, doing: str, permission: str = "bigquery.tables.updateData") -> Iterator[None]:
    """What goes wrong inside becomes AuthError, ConfigError, Missing, Refused or StoreUnavailable, in one line.

    Conflict (409) passes unchanged. `permission`: the one that `doing` needs.
    """
    where = target.where
    try:
        yield
    except google.Conflict:
        raise
    except (auth.DefaultCredentialsError, auth.RefreshError, google.Unauthenticated, google.Unauthorized) as error:
        if getattr(error, "retryable", False):
            raise StoreUnavailable(f"{where}: the credentials cannot be refreshed now ({line(error)})") from None
        raise AuthError(
            f"{where}: no valid Google credentials ({line(error)}): set GOOGLE_APPLICATION_CREDENTIALS to a service "
            "account's key file, or run `gcloud auth application-default login`"
        ) from None
    except google.Forbidden as error:
        if passes(reason_of(error)):
            raise StoreUnavailable(f"{where} cannot {doing} now ({line(error)})") from None
        if reason_of(error) == "billingNotEnabled":
            raise ConfigError(f"{where}: the project has no billing account ({line(error)}): enable billing") from None
        raise AuthError(
            f"{where}: these credentials may not {doing} ({line(error)}): grant {permission} (the roles "
            "roles/bigquery.dataEditor and roles/bigquery.jobUser hold all that the sink needs)"
        ) from None
    except google.NotFound as error:
        raise Missing(f"{where}: not found when about to {doing} ({line(error)})") from None
    except (google.ServerError, google.TooManyRequests, google.Aborted, google.Cancelled, google.RetryError) as error:
        raise StoreUnavailable(f"{where} cannot {doing} now ({line(error)})") from None
    except google.GoogleAPICallError as error:
        if passes(reason_of(error), str(error)) or error.code is None:
            raise StoreUnavailable(f"{where} cannot {doing} now ({line(error)})") from None
        raise Refused(f"{where} refuses to {doing}: {line(error)}") from None
    except (requests.exceptions.RequestException, auth.TransportError, OSError, EOFError) as error:
        raise StoreUnavailable(f"{where} does not answer ({type(error).__name__})") from None


def call(target: Target, doing: str, function: Callable[..., _T], *args: Any, **more: Any) -> _T:
    """One request with the sink's timeout, not repeated by the client. Raises what `errors` does."""
    with errors(target, doing):
        return function(*args, retry=None, timeout=CALL_SECONDS, **more)


def line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    text = str(getattr(error, "message", "") or error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
