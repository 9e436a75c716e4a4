"""Fails (exit code 1) if a run misses a bar: python scripts/check_run.py RUN METRIC AT_LEAST [--last N] [--step S].

The metric is a column of training_metrics.csv; --last takes the mean of its last N values, --step the value there.
"""

import argparse
import sys
from pathlib import Path

import pandas

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("metric")
parser.add_argument("at_least", type=float)
parser.add_argument("--last", type=int, default=1)
parser.add_argument("--step", type=int)
options = parser.parse_args()
path = options.run / "training_metrics.csv"
if not path.is_file():
    sys.exit(f"error: {path} does not exist: give the folder of a run")
table = pandas.read_csv(path).set_index("step")
if options.metric not in table:
    sys.exit(f"error: {path} has no column {options.metric!r}; it has {', '.join(table)}")
curve = table[options.metric].dropna()
if options.step is not None and options.step not in curve:
    sys.exit(f"error: {path} has no {options.metric} of step {options.step}")
value = curve[options.step] if options.step is not None else curve.tail(options.last).mean()
print(f"{options.run}: {options.metric} {value:.4f}, at least {options.at_least} is expected")
sys.exit(int(not value >= options.at_least))
