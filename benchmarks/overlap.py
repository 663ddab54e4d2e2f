"""What the workers of a conversion did with their time, from its timeline.

    streamquant convert SOURCE OUT --scheme W4A16 --trace trace.json
    python benchmarks/overlap.py trace.json

A row for each thread: seconds in each stage, and the share of the time from the first to the last thing that any worker did in which it
did something. What is missing to 100 % is Python between the stages, and waiting.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from measure import print_header, print_row

STAGES = ("read", "decode", "observe", "encode", "write", "fetch", "flush")
MICROSECOND = 1e-6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    events = json.loads(parser.parse_args().trace.read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    work = [event for event in spans if event["name"] not in {"fetch", "flush"}]
    whole = (max(event["ts"] + event["dur"] for event in work) - min(event["ts"] for event in work)) * MICROSECOND
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in spans:
        seconds[names[event["tid"]]][event["name"]] += event["dur"] * MICROSECOND
    print_header("thread", *STAGES, "busy")
    for name in sorted(seconds):
        of_stage = seconds[name]
        busy = sum(of_stage.values()) / whole
        print_row(name, *(f"{of_stage[stage]:.2f} s" if stage in of_stage else "" for stage in STAGES), f"{busy:.0%}")


if __name__ == "__main__":
    main()
