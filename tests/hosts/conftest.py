"""What the tests on emulated hosts share with the others."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
