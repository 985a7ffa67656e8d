"""What `doctor` asks of the vendors: a wrong key is told as wrong, an unreachable server as unreachable."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from services.ingest import doctor
from shared import doctor as engine
from shared.errors import AuthError, ConfigError, Unavailable
from shared.log import Masker
from shared.settings import Settings, load
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.history import DATASETS, History
from tests.fakes.tape import Tape, generate
from tests.fakes.tardis_machine import Machine

WRONG = "db-wrong-key-that-nobody-knows"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this machine either answer at once or never."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.5)


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate(seconds=2, per_second=5)


def of(gateway: Gateway | None = None, history: str = "", key: str = KEY, **more: str) -> Settings:
    environ = {"TAPELINE_FEEDS": "databento", "DATABENTO_API_KEY": key, "TAPELINE_DATABENTO_HISTORY_GATEWAY": history}
    if gateway is not None:
        environ |= {"TAPELINE_DATABENTO_GATEWAY": "127.0.0.1", "TAPELINE_DATABENTO_PORT": str(gateway.port)}
    return load(environ=environ | more)


@contextmanager
def deaf() -> Iterator[int]:
    """The port of a server that takes connections into its queue, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# -- Databento ------------------------------------------------------------------------------


def test_the_live_gateway_knows_the_key_and_nothing_is_asked_of_it(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        said = doctor.live(of(gateway))
    assert said.startswith(f"127.0.0.1:{gateway.port} knows the key, for {tape.dataset}; nothing was subscribed to")
    (session,) = gateway.sessions
    assert session.auth["dataset"] == tape.dataset
    assert (session.live, session.subscriptions) == (False, [])


def test_a_key_that_the_live_gateway_refuses(tape: Tape) -> None:
    with Gateway(tape) as gateway, pytest.raises(AuthError, match=r"refused the API key: .*; check DATABENTO_API_KEY"):
        doctor.live(of(gateway, key=WRONG))
    assert gateway.refused_keys == 1
    with pytest.raises(AuthError, match="there is no key: set DATABENTO_API_KEY"):
        doctor.live(of(key=""))


def test_a_live_gateway_that_nobody_reaches_is_no_wrong_key(tape: Tape) -> None:
    with Gateway(tape) as gateway:
        gateway.refuse()
        with pytest.raises(Unavailable, match=r"cannot connect to 127.0.0.1:\d+ \(Connection refused\): look"):
            doctor.live(of(gateway))
    unknown = of(TAPELINE_DATABENTO_GATEWAY="no..host")
    with pytest.raises(Unavailable, match=r"the name no\.\.host is not found .*: check databento.gateway"):
        doctor.live(unknown)
    with deaf() as port, pytest.raises(Unavailable, match="takes the connection, but does not answer"):
        doctor.live(of(TAPELINE_DATABENTO_GATEWAY="127.0.0.1", TAPELINE_DATABENTO_PORT=str(port)))


def test_a_live_gateway_that_hangs_up(tape: Tape) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        port = str(server.getsockname()[1])
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port} broke the connection off"):
            doctor.live(of(TAPELINE_DATABENTO_GATEWAY="127.0.0.1", TAPELINE_DATABENTO_PORT=port))
        thread.join()


def test_the_archive_knows_the_key_and_has_the_dataset(tape: Tape) -> None:
    with History(tape) as history:
        said = doctor.archive(of(history=history.url))
        assert f"knows the key, {tape.dataset} is one of 2 datasets; asking costs nothing" in said
        assert [endpoint for endpoint, _ in history.requests] == [DATASETS]
        with pytest.raises(AuthError, match=r"refused the API key: .*; check DATABENTO_API_KEY") as error:
            doctor.archive(of(history=history.url, key=WRONG))
        assert WRONG not in str(error.value)
        with pytest.raises(
            ConfigError, match=rf"no dataset XNYS.PILLAR for it: set DATABENTO_DATASET to .*{tape.dataset}"
        ):
            doctor.archive(of(history=history.url, DATABENTO_DATASET="XNYS.PILLAR"))
        for fault, says in (("500", "status 500 was ordered"), ("garbage", ""), ("hang", "")):
            history.fault(DATASETS, fault)
            with pytest.raises(Unavailable, match=f"does not list its datasets: .*{says}.*nothing is bought") as gone:
                doctor.archive(of(history=history.url))
            assert KEY not in str(gone.value)
        assert history.complaints == []
    with pytest.raises(Unavailable, match="does not list its datasets"):
        doctor.archive(of(history=history.url))


def test_findings_of_a_feed_that_works_and_of_one_with_a_wrong_key(tape: Tape) -> None:
    with Gateway(tape) as gateway, History(tape) as history:
        for key, fine in ((KEY, True), (WRONG, False)):
            given = of(gateway, history.url, key)
            checks = [c for c in engine.checks_of(given) if c.name.startswith("databento")]
            assert not any(check.leaves for check in checks)
            found = list(engine.examine(checks, Masker(given)))
            assert [(f.check, f.fine) for f in found] == [("databento live", fine), ("databento archive", fine)]
            assert key not in str(found)
        # Behind a gateway of one's own, the key is not shown to the vendor's archive.
        assert [c.name for c in engine.checks_of(of(gateway)) if "databento" in c.name] == ["databento live"]


# -- Tardis ---------------------------------------------------------------------------------


class Account(BaseHTTPRequestHandler):
    """The vendor's api-key-info."""

    plans: ClassVar[list[dict[str, Any]]] = [
        {"exchange": "deribit", "accessType": "pro", "from": "2019-01-01", "to": "2030-01-01", "symbols": []},
        {"exchange": "binance", "accessType": "pro", "from": "2019-01-01", "to": "2030-01-01", "symbols": []},
    ]
    status = 200

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer TD.right-key"
        status = self.status if known else 401
        body = json.dumps(self.plans if known else {"message": self.headers["Authorization"]}).encode()
        self.send_response(status if self.path == "/v1/api-key-info" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def test_the_tardis_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Account) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr(doctor, "TARDIS_API", f"http://127.0.0.1:{server.server_port}/v1")
        right, wrong = (load(environ={"TARDIS_API_KEY": key}) for key in ("TD.right-key\n", "TD.wrong-key"))
        try:
            assert doctor.tardis_key(right) == "the key is known (pro), for binance, deribit; asking costs nothing"
            with pytest.raises(AuthError, match=r"does not know the key \(401\): check TARDIS_API_KEY") as error:
                doctor.tardis_key(wrong)
            assert "TD.wrong-key" not in str(error.value)
            monkeypatch.setattr(Account, "plans", [])
            with pytest.raises(AuthError, match="knows the key, but it opens nothing"):
                doctor.tardis_key(right)
            monkeypatch.setattr(Account, "status", 503)
            with pytest.raises(Unavailable, match="answers 503: try again later"):
                doctor.tardis_key(right)
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(Unavailable, match=r"does not answer \(.*Connection refused.*\): look whether"):
        doctor.tardis_key(right)
    with deaf() as port:
        monkeypatch.setattr(doctor, "TARDIS_API", f"http://127.0.0.1:{port}/v1")
        with pytest.raises(Unavailable, match=r"does not answer \(.*timed out\)"):
            doctor.tardis_key(right)


def machine(port: int) -> Settings:
    return load(environ={"TAPELINE_FEEDS": "tardis", "TAPELINE_TARDIS_PORT": str(port)})


def test_the_tardis_machine_server() -> None:
    with Machine() as server:
        assert (
            doctor.tardis_machine(machine(server.port)) == f"tardis-machine at 127.0.0.1:{server.port} takes WebSockets"
        )
        for status, kind, says in (
            (404, ConfigError, r"set tardis.port to its WebSocket port \(HTTP port \+ 1\)"),
            (401, AuthError, "check tardis.host"),
            (503, Unavailable, "answers 503: look into its log"),
        ):
            server.status = status
            with pytest.raises(kind, match=says):
                doctor.tardis_machine(machine(server.port))
    with pytest.raises(Unavailable, match=r"cannot connect to tardis-machine at .*refused.*tardis.host, tardis.port"):
        doctor.tardis_machine(machine(free_port()))
    with deaf() as port, pytest.raises(Unavailable, match=r"takes the connection, but no WebSocket .*another server"):
        doctor.tardis_machine(machine(port))
