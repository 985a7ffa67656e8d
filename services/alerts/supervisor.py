"""supervisord's event listener: alerts when a worker has ended for good, or ends again and again.

It tells the channels by itself, without Redis: what ended may be Redis. Nothing is kept over its own end.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import xmlrpc.client
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from supervisor.childutils import get_headers, getRPCTransport

from services.alerts.channels import Message, message_of, open_channel
from services.alerts.core import Job
from services.alerts.outbox import Outbox
from services.alerts.rules import Event, of_event
from shared.alerts import PENDING, Alert
from shared.settings import Settings
from shared.supervised import last_error

log = logging.getLogger(__name__)

# So many ends within so many seconds are no accident any more.
OFTEN, OFTEN_SECONDS = 5, 600.0
STOP_SECONDS = 3.0


class Heard(NamedTuple):
    """One event: what supervisord calls it, which process, and its other words."""

    name: str
    process: str
    words: Mapping[str, str]


class Exits:
    """Which ends are worth telling, and what to say of them; pure but for the times it is given."""

    def __init__(self) -> None:
        self._ends: dict[str, deque[float]] = {}

    def of(self, heard: Heard, exit_code: int, why: str, now: float) -> str:
        """What happened to the process; empty when nobody needs to be told. `now`: seconds on any one clock."""
        because = f": {why}" if why else ""
        if heard.name == "PROCESS_STATE_FATAL":
            return f"does not start and was given up{because}"
        if heard.name == "PROCESS_STATE_EXITED" and heard.words.get("expected") == "1":
            # It ended as it may, and rests: told unless it had nothing more to do.
            return "" if exit_code == 0 else f"ended for good with exit code {exit_code}{because}"
        ends = self._ends.setdefault(heard.process, deque())
        ends.append(now)
        while ends[0] < now - OFTEN_SECONDS:
            ends.popleft()
        if len(ends) < OFTEN:
            return ""
        ends.clear()  # told again only after as many more
        return (
            f"has ended {OFTEN} times within {OFTEN_SECONDS / 60:.0f} minutes and is started again each time{because}"
        )


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001 - takes none
    """Listen on stdin, as supervisord's protocol has it, until stopped or stdin ends. Raises ConfigError."""
    channels = {name: open_channel(settings, name) for name in settings.alerts.channels}
    wake = threading.Event()
    outbox = Outbox(channels, settings.alerts.retry_max_seconds, lambda: True, wake)
    outbox.start()
    heard: queue.SimpleQueue[Heard | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, sys.stdout.buffer, heard), daemon=True).start()
    exits, waiting = Exits(), dict[Job, Message]()
    over = False
    while not stop.is_set() and not (over and not waiting):
        try:
            event = heard.get(timeout=0.2)
            over = over or event is None
            if event is not None:
                waiting |= _messages(event, exits, settings)
        except queue.Empty:
            pass
        results = outbox.results()
        for result in results:
            if result.state != PENDING:
                waiting.pop(result.job, None)
        outbox.settled(len(results))
        outbox.sync(list(waiting), waiting.__getitem__)
    for job, message in waiting.items():
        log.error("not delivered to %s any more: %s", job.channel, message.body["title"])
    outbox.stop(STOP_SECONDS)


def _listen(events: BinaryIO, answers: BinaryIO, heard: queue.SimpleQueue[Heard | None]) -> None:
    """Take every event at once, so that supervisord never has to hold one back; None at the end."""
    while True:
        answers.write(b"READY\n")
        answers.flush()
        line = events.readline().decode()
        if not line:
            heard.put(None)
            return
        header = get_headers(line)
        words = get_headers(events.read(int(header["len"])).decode())
        heard.put(Heard(header["eventname"], words.get("processname", ""), words))
        answers.write(b"RESULT 2\nOK")
        answers.flush()


def _messages(event: Heard, exits: Exits, settings: Settings) -> dict[Job, Message]:
    """A message for each channel that is to be told of an event."""
    info = _info(event.process)
    why = last_error(Path(str(info.get("stdout_logfile", ""))))
    now_ms = int(time.time() * 1000)
    said = exits.of(event, int(info.get("exitstatus", -1)), why, time.monotonic())
    if not said:
        return {}
    log.error("%s %s", event.process, said)
    host = os.uname().nodename
    title = f"{event.process} on {host} {said.partition(':')[0]}"
    told = of_event(Event("worker", event.process, now_ms, title, said), settings.alerts)
    if told is None:
        return {}
    alert = Alert(
        f"supervisor-{event.process}-{now_ms:x}", told.key, told.type, told.severity, told.title, told.text, now_ms,
        now_ms, now_ms, told.subject, details={"worker": event.process, "host": host},
    )  # fmt: skip
    return {Job(alert.id, channel, 0): message_of(alert, 0) for channel in told.channels}


def _info(process: str) -> dict[str, Any]:
    """What supervisord knows of a process; nothing when it cannot be asked now."""
    try:
        with xmlrpc.client.ServerProxy("http://127.0.0.1", getRPCTransport(os.environ)) as proxy:
            found = proxy.supervisor.getAllProcessInfo()
    except (OSError, xmlrpc.client.Error, KeyError) as error:
        log.debug("supervisord cannot be asked: %s", error)
        return {}
    processes = found if isinstance(found, list) else []
    return next((p for p in processes if isinstance(p, dict) and p.get("name") == process), {})
