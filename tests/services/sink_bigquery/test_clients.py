"""What Google's errors mean here, and where the dataset is."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import requests
from google.api_core import exceptions as google
from google.auth.exceptions import DefaultCredentialsError

from services.sink_bigquery import doctor
from services.sink_bigquery.clients import Missing, Refused, Target, errors, target_of
from services.sink_bigquery.store import of
from shared.errors import AuthError, ConfigError, StoreUnavailable
from shared.settings import BigQuery, Settings, Tapeline

AT = Target("p", "d", BigQuery())


def api(kind: type[google.GoogleAPICallError], reason: str, message: str = "told so\nand more") -> Exception:
    return kind(message, errors=[{"reason": reason}])


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (api(google.Forbidden, "accessDenied"), AuthError, "grant bigquery.tables.updateData"),
        (api(google.Unauthorized, "authError"), AuthError, "GOOGLE_APPLICATION_CREDENTIALS"),
        (DefaultCredentialsError("none found"), AuthError, "gcloud auth application-default login"),
        (api(google.Forbidden, "rateLimitExceeded"), StoreUnavailable, "cannot write now"),
        (api(google.Forbidden, "quotaExceeded"), StoreUnavailable, "cannot write now"),
        (api(google.Forbidden, "billingNotEnabled"), ConfigError, "enable billing"),
        (api(google.TooManyRequests, ""), StoreUnavailable, "cannot write now"),
        (api(google.ServiceUnavailable, "backendError"), StoreUnavailable, "cannot write now"),
        (api(google.InternalServerError, "internalError"), StoreUnavailable, "cannot write now"),
        (api(google.NotFound, "notFound"), Missing, "not found"),
        (api(google.BadRequest, "invalid"), Refused, "refuses to write: told so"),
        (api(google.BadRequest, "", "would affect rows in the streaming buffer"), StoreUnavailable, "streaming buffer"),
        (requests.exceptions.ConnectionError("secret-token"), StoreUnavailable, "does not answer (ConnectionError)"),
        (TimeoutError(), StoreUnavailable, "does not answer"),
    ],
)
def test_errors_are_one_line(error: Exception, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught, errors(AT, "write"):
        raise error
    text = str(caught.value)
    assert type(caught.value) is kind
    assert says in text
    assert "BigQuery p.d" in text
    assert "\n" not in text
    assert "secret" not in text


def test_conflicts_are_for_whoever_named_the_job() -> None:
    with pytest.raises(google.Conflict), errors(AT, "write"):
        raise api(google.Conflict, "duplicate")


def test_where_the_dataset_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    beside = BigQuery(project="own", dataset="tape")
    named = target_of(Settings(tapeline=Tapeline(store="bigquery://my-project/my_set"), bigquery=beside))
    assert (named.where, named.endpoint) == ("BigQuery my-project.my_set", "")
    assert named.named("candles") == "`my-project.my_set.candles`"
    assert target_of(Settings(bigquery=beside)).full("gaps") == "own.tape.gaps"
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", "127.0.0.1:1")
    assert named.endpoint == "http://127.0.0.1:1"
    for store, project in (("bigquery://only-a-project", ""), ("bigquery://a/b/c", ""), ("sqlite:///x.db", "p")):
        with pytest.raises(ConfigError, match="bigquery://project/dataset"):
            target_of(Settings(tapeline=Tapeline(store=store), bigquery=BigQuery(project=project)))


def test_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/key.json")
    settings = Settings(tapeline=Tapeline(store="bigquery://p/d"))
    store = of(settings, threading.Event())
    with pytest.raises(AuthError, match=r"no valid Google credentials .*key.json"):
        store.open()
    with pytest.raises(AuthError, match="gcloud auth application-default login"):
        doctor.check(settings)


def test_a_server_that_is_down_is_waited_for() -> None:
    settings = Settings(tapeline=Tapeline(store="bigquery://p/d"), bigquery=BigQuery(endpoint="http://127.0.0.1:1"))
    with pytest.raises(StoreUnavailable, match=r"BigQuery p.d does not answer"):
        of(settings, threading.Event()).open()


def test_without_the_extra() -> None:
    code = (
        "import sys; sys.modules['google.cloud.bigquery'] = None\n"
        "from shared.errors import ConfigError\n"
        "from shared.settings import Settings, Tapeline\n"
        "from shared.sink import store_of\n"
        "import threading\n"
        "try:\n store_of(Settings(tapeline=Tapeline(store='bigquery://p/d')), threading.Event())\n"
        "except ConfigError as error:\n print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'tapeline[bigquery]'" in out
    assert len(out.splitlines()) == 1
