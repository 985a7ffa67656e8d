"""What every request handler gets: `request.app.state.web`, or `websocket.app.state.web`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from starlette.requests import HTTPConnection

from shared.settings import Settings

if TYPE_CHECKING:
    from services.web.hub import Hub
    from services.web.pipeline import Pipeline
    from shared.store_pages import Pages


@dataclass(frozen=True)
class Web:
    """The parts of a running server; all belong to its one event loop."""

    settings: Settings
    pages: Pages
    hub: Hub
    pipeline: Pipeline


def web_of(connection: HTTPConnection) -> Web:
    """The server that a request or WebSocket came to."""
    return cast("Web", connection.app.state.web)
