"""`npd` with slow writing of published versions: python slow_trainer.py SECONDS_PER_CHUNK trainer CONFIG ..."""

from __future__ import annotations

import sys

from publish_worker import write_slowly

from megatron_npd.cli import main

if __name__ == "__main__":
    write_slowly(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
