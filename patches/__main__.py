"""``python -m patches [--json]``: what this installation's defects are, and what is done about them."""

import json
import sys

from . import explain, observe

rows = explain()
if "--json" in sys.argv:
    print(json.dumps({"release": observe().release, "cuda": observe().cuda, "patches": rows}))
else:
    print(f"nvidia-cutlass-dsl {observe().release}, CUDA {observe().cuda}, {observe().path}")
    for row in rows:
        print(f"\n{row['name']}: {row['state']}")
        for field in ("found", "what", "upstream", "affected", "remedy"):
            print(f"  {field:9}{row[field]}")
