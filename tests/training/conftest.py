"""Makes the toy methods importable; they also run as scripts in processes of their own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
