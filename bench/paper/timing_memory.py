"""Peak memory of one meta-iteration in one way, in a process of its own: prints bytes as JSON."""

from __future__ import annotations

import json
import sys

import torch

from bench.paper.timing import peak

if __name__ == "__main__":
    rule, way, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps({"peak_bytes": peak(rule, way)}))
