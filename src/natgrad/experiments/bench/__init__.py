"""The benchmark suite: every workload, every contestant, one protocol. ``natgrad bench`` on the command line.

- `workload`, `workloads`: what is to be learned.
- `contestants`, `spaces`: who learns it, and from which settings each may choose.
- `trial`: one contestant at work, with its own clock; a race between several.
- `records`: what is written, and reading it back.
- `protocol`: tuning and runs, and which of them are still missing.
- `results`, `report`, `style`: targets, time to target, performance profiles; the table and the plots.
- `cost`, `memory`, `models`: what a step takes, and the two models of how that grows.
- `commands`: each an option list and one function call.

The rivals' packages are the extra ``natgrad[benchmarks]``; a contestant imports its own when it is built.
"""
