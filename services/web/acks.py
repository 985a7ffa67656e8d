"""The alerts, and the acknowledging of alerts and signals: the only thing that this API writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from services.web.context import web_of
from services.web.problems import Json, missing, once
from services.web.threads import in_thread
from shared.acks import ack_alert, ack_signal, alerts_of, signal_acks, signal_key
from shared.bus import Bus
from shared.settings import Settings

T = TypeVar("T")
router = APIRouter(prefix="/api/v1", tags=["alerts"])
# No form of another site can send it, and a page of another site only where web.cors_origins lets it.
ASKED = Header(alias="X-Tapeline", description="Always `1`: a form of another site cannot send it.")


async def asked(x_tapeline: Annotated[Literal["1"], ASKED]) -> None:
    """What a request that writes must carry."""


class By(BaseModel):
    """Who acknowledges."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    by: str = Field(min_length=1, max_length=100, description="A name, for people.", examples=["ann"])


class SignalAsked(By):
    """The key of a signal's row, as the signals tell it, and who acknowledges it."""

    underlying: str = Field(min_length=1, max_length=100, examples=["ES"])
    expiration: str | None = Field(None, max_length=40, examples=["2026-12-18T21:30:00Z"])
    strike: float | None = Field(None, allow_inf_nan=False)
    option_type: str | None = Field(None, max_length=4, examples=["C"])
    time_window: str = Field(max_length=40, examples=["2026-11-21T14:30:00Z"])
    source: str = Field("tapeline", min_length=1, max_length=100)


class AlertsAsked(BaseModel):
    """Which alerts."""

    model_config = ConfigDict(extra="forbid")

    all: bool = Field(False, description="Also those that are acknowledged.")


@router.get("/alerts", summary="Alerts, the newest last", response_model=None)
async def alerts(request: Request, wanted: Annotated[AlertsAsked, Query()]) -> Json:
    """Alerts that nobody has acknowledged, each with what became of its deliveries; the newest 1,000 are kept."""
    once(request)
    found = await _on_bus(request, alerts_of)
    return Json({"alerts": [alert for alert in found if wanted.all or not alert.acked_by]})


@router.post("/alerts/{id}/ack", summary="Acknowledge an alert", response_model=None, dependencies=[Depends(asked)])
async def acknowledge_alert(
    request: Request, body: By, alert_id: Annotated[str, Path(alias="id", max_length=64)]
) -> Json:
    """It is not escalated then, nor delivered to any channel that has not got it yet. Whoever was first stays."""

    def work(bus: Bus) -> str:
        alert = next((alert for alert in alerts_of(bus) if alert.id == alert_id), None)
        if alert is None:
            raise missing(f"there is no alert '{alert_id}'")
        if not alert.acked_by:
            ack_alert(bus, alert, body.by)
        return alert.acked_by or body.by

    return Json({"acknowledged": True, "by": await _on_bus(request, work)})


@router.get("/signals/acks", summary="Signals that somebody has acknowledged", response_model=None)
async def acks(request: Request) -> Json:
    """Their keys, by whom and when, the newest last; the newest 10,000 are kept."""
    return Json({"acks": await _on_bus(request, signal_acks)})


@router.post("/signals/ack", summary="Acknowledge a signal", response_model=None, dependencies=[Depends(asked)])
async def acknowledge_signal(request: Request, body: SignalAsked) -> Json:
    """So that everybody sees that it was seen. An alert of the signal is acknowledged with it."""
    key = signal_key(
        body.underlying, body.expiration, body.strike, body.option_type, body.time_window, body.source
    )  # fmt: skip
    await _on_bus(request, lambda bus: ack_signal(bus, key, body.by))
    return Json({"acknowledged": True})


async def _on_bus(request: Request, work: Callable[[Bus], T]) -> T:
    """What `work` makes of the bus, in a thread. Raises BusUnavailable."""
    settings: Settings = web_of(request).settings

    def run() -> T:
        s = settings.redis
        bus = Bus(s.url, settings.tapeline.namespace, cluster=s.cluster)
        try:
            return work(bus)
        finally:
            bus.close()

    return await in_thread(run, "web-acks")
