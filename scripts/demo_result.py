"""How many of the rows that are known to be wrong a curation dropped: demo_result.py OUT.audit.parquet.

Ends with an error where it dropped less than three quarters of them.
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq

from clear_datasets.noise import auroc

rows = pq.read_table(sys.argv[1]).to_pylist()
wrong = [r for r in rows if r["noise"]]
dropped = [r for r in rows if r["clear_decision"] == "drop"]
caught = sum(bool(r["noise"]) for r in dropped)
area = auroc([r["clear_confidence"] for r in rows], [not r["noise"] for r in rows])
print(f"{caught} of the {len(wrong)} wrong rows ({caught / len(wrong):.0%}) are among the {len(dropped)} dropped ones")
print(f"AUROC of confidence, right against wrong rows: {area:.3f}")
if caught < 0.75 * len(wrong):
    sys.exit("less than the 75% of the wrong rows that this model drops at --keep 0.5: something is broken")
