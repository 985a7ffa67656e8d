"""What the tests of the web service use: the servers of tests.serving."""

from __future__ import annotations

from tests.serving import Answer, Served, Serving, ask

__all__ = ["Answer", "Served", "Serving", "ask"]
