"""`make bench`: measure, print, and write benchmarks/results/latest.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks import first_chart, kernel, latency, machine, pipeline, postgres, pressure, tardis, web

PARTS = {
    "kernel": kernel.run, "pressure": pressure.run, "pipeline": pipeline.run, "latency": latency.run,
    "tardis": tardis.run, "postgres": postgres.run_all,
    "web": web.run, "first_chart": first_chart.run,
}  # fmt: skip


def main(wanted: list[str]) -> None:
    out = Path(__file__).parent / "results" / "latest.json"
    found = json.loads(out.read_text()) if out.is_file() else {}
    found["machine"] = machine.describe()
    for name in wanted or PARTS:
        found[name] = {"at": time.strftime("%Y-%m-%d", time.gmtime()), **PARTS[name]()}
        print(json.dumps({name: found[name]}, indent=2), flush=True)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
