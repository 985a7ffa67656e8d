"""What `tapeline doctor` asks of the vendors: whether they know the key, by their own handshakes. It costs nothing.

Each returns one line. Raises AuthError for a key that is refused, Unavailable where nobody answers, ConfigError.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import os
import socket
import threading
import urllib.error
import urllib.request
from typing import Any, cast

import msgspec
from databento.live.protocol import DatabentoLiveProtocol

from services.ingest.databento_history import WHERE, Archive
from services.ingest.databento_live import authenticated, host_of
from services.ingest.databento_session import one_line
from services.ingest.tardis_request import refused_upgrade
from shared.doctor import REACH
from shared.errors import AuthError, ConfigError, Unavailable
from shared.settings import Settings

CONNECT_SECONDS = 4.0
TARDIS_API = "https://api.tardis.dev/v1"


def live(settings: Settings) -> str:
    """Authenticate at the live gateway as a session does, and leave before anything is subscribed to."""
    s = settings.databento
    if not s.api_key:
        raise AuthError("the databento feed is chosen, but there is no key: set DATABENTO_API_KEY")
    host, where = host_of(s), f"{host_of(s)}:{s.port}"
    connection = _reached(host, s.port, "databento.gateway, databento.port" if s.gateway else "databento.dataset")
    try:
        asyncio.run(_handshake(settings, connection))
    except TimeoutError:
        raise Unavailable(f"{where} takes the connection, but does not answer: {REACH}") from None
    except (OSError, ConnectionError) as error:
        raise Unavailable(f"{where} broke the connection off ({error}): {REACH}") from None
    return f"{where} knows the key, for {s.dataset}; nothing was subscribed to, so it costs nothing"


async def _handshake(settings: Settings, connection: socket.socket) -> None:
    s, loop = settings.databento, asyncio.get_running_loop()
    connection.setblocking(False)
    transport, protocol = await loop.create_connection(
        lambda: cast("asyncio.BaseProtocol", DatabentoLiveProtocol(s.api_key, s.dataset)), sock=connection
    )
    wire: Any = protocol
    try:
        done, _ = await asyncio.wait(
            {wire.authenticated, wire.disconnected}, timeout=CONNECT_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if wire.authenticated in done:
            authenticated(wire.authenticated, s)
        elif done:
            raise ConnectionError(str(wire.disconnected.exception() or "it was closed"))
        else:
            raise TimeoutError
    finally:
        transport.abort()
        for future in (wire.authenticated, wire.disconnected):
            if future.done():
                future.exception()  # seen, or asyncio complains


def archive(settings: Settings) -> str:
    """Whether the historical API knows the key, and has the dataset."""
    s = settings.databento
    asked = Archive(s, threading.Event(), silence_seconds=CONNECT_SECONDS, whole_seconds=2 * CONNECT_SECONDS)
    try:
        found = asked.datasets()
    except Unavailable as error:
        # A live feed alone does without.
        raise Unavailable(f"{error}; without it nothing is bought, backfilled or imported: {REACH}") from None
    if s.dataset not in found:
        raise ConfigError(
            f"{WHERE} knows the key, but has no dataset {s.dataset} for it: set DATABENTO_DATASET to one of "
            f"{', '.join(sorted(found)[:8]) or 'none'}{' …' if len(found) > 8 else ''}, or ask the vendor for it"
        )
    return f"{WHERE} knows the key, {s.dataset} is one of {len(found)} datasets; asking costs nothing"


def tardis_key(settings: Settings) -> str:
    """Whether the vendor knows the key, and what it opens."""
    url = f"{TARDIS_API}/api-key-info"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {settings.tardis.api_key.strip()}"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response:  # noqa: S310 - a constant
            body = response.read()
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):
                raise AuthError(f"{url} does not know the key ({error.code}): check TARDIS_API_KEY") from None
            raise Unavailable(f"{url} answers {error.code}: try again later") from None
    except (OSError, http.client.HTTPException) as error:
        why = one_line(str(getattr(error, "reason", error)), settings.tardis.api_key)
        raise Unavailable(f"{url} does not answer ({why}): {REACH}") from None
    try:
        plans = msgspec.json.decode(body, type=list[dict[str, Any]])
    except msgspec.DecodeError:
        raise Unavailable(f"{url} gives a strange answer: try again later") from None
    names = sorted({str(plan.get("exchange", "?")) for plan in plans})
    if not names:
        raise AuthError(f"{url} knows the key, but it opens nothing: its time is over, or check TARDIS_API_KEY")
    kinds = ", ".join(sorted({str(plan[name]) for plan in plans for name in ("accessType",) if plan.get(name)}))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"the key is known{f' ({kinds})' if kinds else ''}, for {shown}; asking costs nothing"


def tardis_machine(settings: Settings) -> str:
    """Whether a tardis-machine server takes WebSockets where the settings say."""
    s = settings.tardis
    where = f"tardis-machine at {s.host}:{s.port}"
    _reached(s.host, s.port, "tardis.host, tardis.port", where).close()
    connection = http.client.HTTPConnection(s.host, s.port, timeout=CONNECT_SECONDS)
    headers = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
    }  # fmt: skip
    try:
        connection.request("GET", "/ws-stream-normalized?options=%5B%5D", headers=headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{where} takes the connection, but no WebSocket ({_why(error)}): is it another server?"
                          ) from None  # fmt: skip
    finally:
        connection.close()
    if status != http.HTTPStatus.SWITCHING_PROTOCOLS:
        raise refused_upgrade(status, where) or Unavailable(f"{where} answers {status}: look into its log")
    return f"{where} takes WebSockets"


def _reached(host: str, port: int, settings: str, where: str = "") -> socket.socket:
    """A connection. Raises ConfigError for a name that nobody knows, Unavailable."""
    where = where or f"{host}:{port}"
    try:
        return socket.create_connection((host, port), CONNECT_SECONDS)
    except (socket.gaierror, UnicodeError) as error:
        raise Unavailable(f"{where}: the name {host} is not found ({_why(error)}): check {settings}, and DNS"
                          ) from None  # fmt: skip
    except TimeoutError:
        raise Unavailable(f"{where} does not answer: {REACH} ({settings})") from None
    except OSError as error:
        raise Unavailable(f"cannot connect to {where} ({_why(error)}): {REACH} ({settings})") from None


def _why(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
