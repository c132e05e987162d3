"""Reads what a run logged."""

import json
from pathlib import Path


def read_losses(log: Path) -> list[dict]:
    """The log without the times, which no two runs share."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]
