"""What the tests of this plugin and of its documentation share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# The plain components; and the plugin, where it is not installed, which brings Ray: a heavy dependency.
sys.path[:0] = [str(HERE.parent), str(ROOT / "tests")]
